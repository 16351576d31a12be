"""The dtypes that engines read and write. `csrc/dtypes.h` is the same list in C++, in the same order."""

from functools import cache

import torch

LIST = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATING = frozenset(LIST)


@cache
def of_bits(bits: int) -> frozenset[torch.dtype]:
    """Those whose places in the list are set in `bits`."""
    return frozenset(dtype for place, dtype in enumerate(LIST) if bits >> place & 1)
