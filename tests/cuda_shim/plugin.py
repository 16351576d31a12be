"""A pytest plugin: the CUDA engine, built against the host shim, serves the CPU's tensors."""

from collections.abc import Set

import torch

from fusedclip.backends.cuda import Cuda


def _refuses(self: Cuda, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
    return None if device.type == "cpu" else "the shim runs on the host"


Cuda.refuses = _refuses  # type: ignore[method-assign]
