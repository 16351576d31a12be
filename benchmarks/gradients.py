"""Parameters with gradients to benchmark on, and the way back to the gradients' first values."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.workloads import Workload

SPREAD = 1e-3
# Random numbers are drawn once and repeated: drawing 2^28 of them would take longer than the benchmark.
PERIOD = 1 << 24
MIXED = "mixed"


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes that the tensors of a workload have in turn; the widest first, which keeps all of them aligned."""
    return (torch.float32, torch.bfloat16) if name == MIXED else (getattr(torch, name),)


class Gradients:
    """Parameters whose gradients are allocations of their own, as autograd makes them, and their first values.

    Those lie in one stretch of memory, `memory` (bytes), the elements of each dtype one after another. `dtype` is
    a name of torch's, or "mixed".
    """

    def __init__(self, workload: Workload, dtype: str, device: torch.device, seed: int) -> None:
        self.workload, self.dtype, dtypes = workload, dtype, dtypes_of(dtype)
        sizes = [math.prod(shape) for shape in workload.shapes]
        of_dtype = [sizes[i :: len(dtypes)] for i in range(len(dtypes))]
        nbytes = [sum(own) * dtype.itemsize for own, dtype in zip(of_dtype, dtypes, strict=True)]
        self.memory = torch.empty(sum(nbytes), dtype=torch.uint8, device=device)
        flats = [part.view(dtype) for part, dtype in zip(torch.split(self.memory, nbytes), dtypes, strict=True)]
        for flat in flats:
            fill(flat, seed)
        pieces = [iter(torch.split(flat, own)) for flat, own in zip(flats, of_dtype, strict=True)]
        self.saved = [next(pieces[i % len(dtypes)]).view(shape) for i, shape in enumerate(workload.shapes)]
        # The parameters' own values are never touched, so on the CPU they take no memory.
        self.parameters = [Parameter(torch.empty_like(saved)) for saved in self.saved]
        self.tensors = [saved.clone() for saved in self.saved]
        for parameter, gradient in zip(self.parameters, self.tensors, strict=True):
            parameter.grad = gradient
        self.nbytes = self.memory.numel()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the gradients their first values again."""
        torch._foreach_copy_(self.tensors, self.saved)


def fill(flat: Tensor, seed: int) -> None:
    """Normal values, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(min(flat.numel(), PERIOD), generator=generator).mul_(SPREAD).to(flat.dtype).to(flat.device)
    for part in torch.split(flat, PERIOD):
        part.copy_(draw[: part.numel()])
