"""The memory's read bandwidth, measured in turn with the contenders: no call can be faster than reading its bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Entry

PREFIX = "read floor: "


def readers(memory: Tensor, before: Callable[[], object]) -> list[Entry]:
    """Plain sums over `memory` (bytes), read as fp32 and as int64.

    Of all reductions in torch 2.13 these two read fastest on a CPU (int64 79 to 85 GB/s, fp32 51 to 80 on the machine
    of the first measurements; dot 66, amax 69). The floor of a row is the faster one.
    """
    whole = memory[: memory.numel() // 8 * 8]
    return [
        Entry(f"{PREFIX}sum of {dtype}".replace("torch.", ""), whole.view(dtype).sum, before)
        for dtype in (torch.float32, torch.int64)
    ]
