"""The dtypes that engines read and write. `csrc/dtypes.h` is the same list in C++."""

import torch

FLOATING = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
