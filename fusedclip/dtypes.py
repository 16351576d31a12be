"""The dtypes that engines read and write. `csrc/dtypes.h` is the same list in C++, in the same order: an extension with
another one does not load. The Triton engine's is made from this one."""

from collections.abc import Set
from functools import cache

import torch

LIST = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATING = frozenset(LIST)


def name_of(dtype: torch.dtype) -> str:
    """What torch and Triton call it."""
    return str(dtype).removeprefix("torch.")


def unknown(dtypes: Set[torch.dtype]) -> str | None:
    """Why an engine that reads the list does not serve gradients of these dtypes, or None."""
    others = ", ".join(sorted(map(str, dtypes - FLOATING)))
    return f"it does not know {others}" if others else None


@cache
def of_bits(bits: int) -> frozenset[torch.dtype]:
    """Those whose places in the list are set in `bits`."""
    return frozenset(dtype for place, dtype in enumerate(LIST) if bits >> place & 1)
