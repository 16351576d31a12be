"""Real text that every Python has: the sources of its own standard library, as bytes."""

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
MEGABYTES = 4


@cache
def standard_library() -> Tensor:
    """The library's top-level modules in order of their names, up to MEGABYTES."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))[: MEGABYTES << 20]
    if len(sources) < 1 << 16:
        raise RuntimeError(f"this Python's standard library has no sources to train on in {folder}")
    return torch.frombuffer(bytearray(sources), dtype=torch.uint8)


def batches(count: int, batch: int, length: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random windows, each with its successor byte by byte, int64, on the CPU."""
    text, generator = standard_library(), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count, batch), generator=generator)
    windows = text[starts[..., None] + torch.arange(length + 1)].long()
    return [(window[:, :-1], window[:, 1:]) for window in windows]
