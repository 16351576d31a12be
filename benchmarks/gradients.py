"""Parameters with gradients to benchmark on, and the way back to the gradients' first values."""

import math
from collections.abc import Sequence

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
    """Parameters whose gradients are allocations of their own, as autograd makes them, and a flat copy of those.

    The copy is one stretch of memory, `memory`, with the elements of each dtype one after another in `flats`.
    """

    def __init__(self, workload: Workload, dtypes: Sequence[torch.dtype], device: torch.device, seed: int) -> None:
        owners = [dtypes[i % len(dtypes)] for i in range(workload.tensors)]
        self.sizes = [math.prod(shape) for shape in workload.shapes]
        of_dtype = [[n for n, own in zip(self.sizes, owners, strict=True) if own == dtype] for dtype in dtypes]
        counts = [sum(sizes) for sizes in of_dtype]
        self.memory, self.flats = flat_memory(dtypes, counts, device)
        self._now = flat_memory(dtypes, counts, device)[1]
        for flat in self.flats:
            fill(flat, seed)
        pieces = [iter(torch.split(flat, sizes)) for flat, sizes in zip(self.flats, of_dtype, strict=True)]
        self._saved = [next(pieces[i % len(dtypes)]).view(shape) for i, shape in enumerate(workload.shapes)]
        # The parameters' own values are never touched, so on the CPU they take no memory.
        self.parameters = [Parameter(torch.empty_like(saved)) for saved in self._saved]
        for parameter, saved in zip(self.parameters, self._saved, strict=True):
            parameter.grad = saved.clone()

    @property
    def tensors(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the gradients their first values again."""
        torch._foreach_copy_(self.tensors, self._saved)

    def now(self) -> list[Tensor]:
        """The gradients as they are now, in the order of `flats`; the next call writes over the answer."""
        for out in self._now:
            torch.cat([gradient.flatten() for gradient in self.tensors if gradient.dtype == out.dtype], out=out)
        return self._now


def flat_memory(
    dtypes: Sequence[torch.dtype], counts: Sequence[int], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One stretch of memory as bytes, and one after another in it the elements of each dtype."""
    parts = [count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)]
    memory = torch.empty(sum(parts), dtype=torch.uint8, device=device)
    return memory, [part.view(dtype) for part, dtype in zip(torch.split(memory, parts), dtypes, strict=True)]


def fill(flat: Tensor, seed: int) -> None:
    """Normal values, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(min(flat.numel(), PERIOD), generator=generator).mul_(SPREAD).to(flat.dtype).to(flat.device)
    for part in torch.split(flat, PERIOD):
        part.copy_(draw[: part.numel()])
