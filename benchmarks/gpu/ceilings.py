"""The memory's ceilings: GB/s of programs that do nothing but read, or copy. Every one that could be the fastest takes
part, and the fastest counts.
"""

import importlib.util
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import race, readers
from benchmarks.timing import Budget, Entry

NBYTES = 2 << 30  # as much as the largest rows
BLOCKS, PROGRAMS = (1024, 2048, 4096), (2, 4, 8, 16)  # of the Triton reader: words of 8 bytes; per multiprocessor


def measure(device: torch.device, seconds: float, seed: int, nbytes: int = NBYTES) -> dict[str, Any]:
    """GB/s, and whose; a copy counts what it reads and what it writes."""
    memory = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(memory)
    floats, into = memory.view(torch.float32), target.view(torch.float32)
    # The driver's own copy, and a kernel's (an elementwise one: torch copies equal dtypes by the driver).
    copying = [
        Entry("copy: copy_", lambda: target.copy_(memory), passes=2),
        Entry("copy: neg", lambda: torch.neg(floats, out=into), passes=2),
    ]
    reading = readers(memory)
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        reading += triton_readers(memory)
    timed = race([*reading, *copying], nbytes, device, Budget(seconds), seed)
    read, copy = (min((timed[one.name] for one in each), key=lambda one: one.device_us) for each in (reading, copying))
    rates = {"read": read.gb_per_s, "read_by": read.contender, "copy": copy.gb_per_s, "copy_by": copy.contender}
    return rates | {"nbytes": nbytes}


def triton_readers(memory: Tensor) -> list[Entry]:
    from benchmarks.gpu.reader import read

    processors = torch.cuda.get_device_properties(memory.device).multi_processor_count
    words = memory.view(torch.int64)
    entries = []
    for block, programs in product(BLOCKS, PROGRAMS):
        call = partial(read, words, words.new_empty(programs * processors), block)
        call()  # compiles
        entries.append(Entry(f"triton reader, {block} words, {programs} programs", call, passes=1))
    return entries
