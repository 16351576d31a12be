"""The memory's ceilings: GB/s of programs that do nothing but read, or copy. Every one that could be the fastest takes
part, and the fastest counts.
"""

import importlib.util
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.measure import readers
from benchmarks.timing import Budget, Entry, flusher, quantiles_us, take_turns

NBYTES = 2 << 30  # as much as the largest rows
COPY = "copy: "
BLOCKS, PROGRAMS = (1024, 2048, 4096), (2, 4, 8, 16)  # of the Triton reader: words of 8 bytes; per multiprocessor


@dataclass(frozen=True)
class Ceilings:
    """GB/s, and whose; a copy counts what it reads and what it writes."""

    read: float
    read_by: str
    copy: float
    copy_by: str
    nbytes: int


def measure(device: torch.device, seconds: float, seed: int, nbytes: int = NBYTES) -> Ceilings:
    memory = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    entries = [*readers(memory), *copiers(memory)]
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        entries += triton_readers(memory)
    samples = take_turns(entries, device, Budget(seconds), seed, flusher(device, nbytes))
    medians = {name: quantiles_us(one.device for one in times)[1] for name, times in samples.items()}
    rates = {name: nbytes / us / 1e3 for name, us in medians.items()}
    reads = {name: rate for name, rate in rates.items() if not name.startswith(COPY)}
    copies = {name: 2 * rate for name, rate in rates.items() if name.startswith(COPY)}
    read_by, copy_by = max(reads, key=reads.__getitem__), max(copies, key=copies.__getitem__)
    return Ceilings(reads[read_by], read_by, copies[copy_by], copy_by, nbytes)


def copiers(memory: Tensor) -> list[Entry]:
    """The driver's own copy, and a kernel's (an elementwise one: torch copies equal dtypes by the driver)."""
    target = torch.empty_like(memory)
    floats, into = memory.view(torch.float32), target.view(torch.float32)
    return [
        Entry(f"{COPY}copy_", lambda: target.copy_(memory)),
        Entry(f"{COPY}neg", lambda: torch.neg(floats, out=into)),
    ]


def triton_readers(memory: Tensor) -> list[Entry]:
    from benchmarks.gpu.reader import read

    processors = torch.cuda.get_device_properties(memory.device).multi_processor_count
    words = memory.view(torch.int64)
    entries = []
    for block, programs in product(BLOCKS, PROGRAMS):
        out = words.new_empty(programs * processors)

        def call(block: int = block, out: Tensor = out) -> None:
            read(words, out, block)

        call()  # compiles
        entries.append(Entry(f"triton reader, {block} words, {programs} programs", call))
    return entries
