"""Parameters with gradients to benchmark on, and the way back to the gradients' first values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.workloads import Workload

SPREAD = 1e-3
# Random numbers are drawn once and repeated: drawing 2^28 of them would take longer than the benchmark.
PERIOD = 1 << 24


class Gradients:
    """Parameters whose gradients are allocations of their own, as autograd makes them, and a flat copy of those."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.flat = random_values(workload.elements, dtype, device, seed)
        self._now = torch.empty_like(self.flat)
        self.parameters: list[Parameter] = []
        self._saved: list[Tensor] = []
        for saved, shape in zip(self._pieces(workload), workload.shapes, strict=True):
            # The parameters' own values are never touched, so on the CPU they take no memory.
            parameter = Parameter(torch.empty(shape, dtype=dtype, device=device))
            parameter.grad = saved.view(shape).clone()
            self.parameters.append(parameter)
            self._saved.append(saved.view(shape))

    def _pieces(self, workload: Workload) -> Iterator[Tensor]:
        return iter(torch.split(self.flat, [math.prod(shape) for shape in workload.shapes]))

    @property
    def tensors(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @property
    def sizes(self) -> list[int]:
        return [saved.numel() for saved in self._saved]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    @torch.no_grad()
    def restore(self) -> None:
        """Give the gradients their first values again."""
        torch._foreach_copy_(self.tensors, self._saved)

    def flattened(self) -> Tensor:
        """The gradients as they are now, in the order of `flat`; the next call writes over the answer."""
        return torch.cat([gradient.flatten() for gradient in self.tensors], out=self._now)


def random_values(count: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(min(count, PERIOD), generator=generator).mul_(SPREAD).to(dtype).to(device)
    values = torch.empty(count, dtype=dtype, device=device)
    for part in torch.split(values, PERIOD):
        part.copy_(draw[: part.numel()])
    return values
