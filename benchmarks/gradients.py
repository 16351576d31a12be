"""Parameters with gradients to benchmark on, and the way back to the gradients' first values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
        self._owners = [dtypes[i % len(dtypes)] for i in range(workload.tensors)]
        self._dtypes = dtypes
        sizes = [math.prod(shape) for shape in workload.shapes]
        self.sizes = sizes
        counts = [sum(n for n, own in zip(sizes, self._owners, strict=True) if own == dtype) for dtype in dtypes]
        self.memory, self.flats = flat_memory(dtypes, counts, device)
        self._now = flat_memory(dtypes, counts, device)[1]
        for flat in self.flats:
            fill(flat, seed)
        self._saved = [piece.view(shape) for piece, shape in zip(self._pieces(), workload.shapes, strict=True)]
        self.parameters: list[Parameter] = []
        for saved in self._saved:
            # The parameters' own values are never touched, so on the CPU they take no memory.
            parameter = Parameter(torch.empty_like(saved))
            parameter.grad = saved.clone()
            self.parameters.append(parameter)

    def _pieces(self) -> Iterator[Tensor]:
        """The saved values of one gradient after another."""
        rest = {
            dtype: iter(torch.split(flat, [n for n, own in zip(self.sizes, self._owners, strict=True) if own == dtype]))
            for dtype, flat in zip(self._dtypes, self.flats, strict=True)
        }
        return (next(rest[own]) for own in self._owners)

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
        tensors = self.tensors
        for dtype, out in zip(self._dtypes, self._now, strict=True):
            torch.cat([gradient.flatten() for gradient in tensors if gradient.dtype == dtype], out=out)
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
