"""What no call can be faster than: the best of a family of plain loops over as many bytes, on torch's threads.

A plain sum is no floor: on some processors several streams of addresses, or asking for memory ahead, read it a third
faster. The loops are `floors.cpp`, compiled when they are first needed.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Entry

SOURCE = Path(__file__).with_name("floors.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")
# Streams; bytes to ask ahead and whether by page. One prefetch for each page has its address looked up in time.
LOOPS = [*product((1, 2, 4, 8), ((0, False), *((n, False) for n in (512, 1024, 2048, 4096)), (65536, True)))]
ROUNDS, FINALISTS = 3, 2


@cache
def _library() -> Any:
    """The compiled loops; None without a compiler. Not linked with OpenMP: torch has brought its own."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built, made = (str(Path(folder) / name) for name in ("floors.o", "floors.so"))
        subprocess.run([compiler, *FLAGS, "-c", str(SOURCE), "-o", built], check=True)
        subprocess.run([compiler, "-shared", built, "-o", made], check=True)
        library = ctypes.CDLL(made)
    library.go_through.restype = ctypes.c_uint64
    return library


def go_through(memory: Tensor, streams: int, ahead: int, by_page: bool, stores: bool, key: int = 0) -> int:
    """One loop over all lines of `memory`, but for a few at the end; the sum of each line's first word where nothing is
    stored. What is stored is what was read, with the bits of `key` flipped in each word."""
    where, size, flipped = ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.nbytes), ctypes.c_uint64(key)
    # A team that was woken for little goes on spinning, into the calls that take turns with this one.
    threads = max(1, min(torch.get_num_threads(), memory.nbytes >> 20))
    total: int = _library().go_through(where, size, threads, streams, ctypes.c_int64(ahead), by_page, stores, flipped)
    return total


def loops(memory: Tensor, stores: bool) -> list[Entry]:
    """The fastest loops of the family in a few rounds over this memory, to take turns with what is held against them.

    None without a compiler, and none on a GPU.
    """
    if memory.device.type != "cpu" or _library() is None:
        return []
    family = [entry(memory, stores, *loop) for loop in LOOPS]
    best = {one.name: min(_seconds(one) for _ in range(ROUNDS)) for one in family}
    return sorted(family, key=lambda one: best[one.name])[:FINALISTS]


def entry(memory: Tensor, stores: bool, streams: int, ahead: tuple[int, bool]) -> Entry:
    distance, by_page = ahead
    turns = "1 stream" if streams == 1 else f"{streams} streams"
    asking = f", {distance} bytes ahead{' by page' if by_page else ''}" if distance else ""
    name = f"{'read and write' if stores else 'read'} floor: {turns}{asking}"
    return Entry(name, partial(go_through, memory, streams, distance, by_page, stores), passes=2 if stores else 1)


def _seconds(one: Entry) -> float:
    start = time.perf_counter()
    one.call()
    return time.perf_counter() - start
