"""The specification: what every engine computes, in plain torch, on any device. Slow, and meant to be read first."""

import math
from collections.abc import Set

import torch
from torch import Tensor

from ..gradients import Batch, store
from ..norms import fold, identity
from ..norms import lift as lift_elements
from .base import Backend, Written
from .reference_update import ReferenceUpdater


class Reference(Backend):
    name = "reference"
    updater = ReferenceUpdater()

    def missing(self) -> str | None:
        return None

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        if device.type == "mps":
            return "MPS has no float64, in which norms are summed"
        return None

    @torch.no_grad()
    def lift(self, batch: Batch, p: float) -> Tensor:
        return torch.stack([lifted(tensor, p) for tensor in batch.tensors])

    @torch.no_grad()
    def stats(self, batch: Batch) -> Tensor:
        return torch.stack([lifted_stats(tensor) for tensor in batch.tensors], 1)

    @torch.no_grad()
    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> Written:
        for tensor, c in zip(batch.tensors, coef.expand(len(batch.tensors)), strict=True):
            if c.device.type == "cpu" and c == 1:
                continue
            scaled = (tensor.double() * c).to(tensor.dtype)
            if zero:
                scaled = torch.where(c == 0, 0.0, scaled)
            store(tensor, torch.where(c == 1, tensor, scaled))  # the host must not wait for a device's c
        return True if coef.device.type != "cpu" else (coef != 1).tolist()

    @torch.no_grad()
    def clamp_(self, batch: Batch, bound: float) -> Written:
        written = []
        for tensor in batch.tensors:
            beyond = tensor.double().abs() > bound
            written.append(tensor.device.type != "cpu" or bool(beyond.any()))  # the host must not wait for a device
            if written[-1]:
                store(tensor, tensor.double().clamp(-bound, bound))
        return written


def lifted(tensor: Tensor, p: float) -> Tensor:
    """|x|^p summed over all elements x, fp64, 0-d; the identity of the sum, max or min if there are none."""
    if not tensor.numel():
        return torch.full((), identity(p), dtype=torch.float64, device=tensor.device)
    return fold(lift_elements(tensor, p), p)


def lifted_stats(tensor: Tensor) -> Tensor:
    """The statistics of all elements, fp64, [5]."""
    squares, magnitudes, largest = (lifted(tensor, p) for p in (2.0, 1.0, math.inf))
    counts = ((tensor == 0).sum(), tensor.isfinite().logical_not().sum())
    return torch.stack([squares, magnitudes, *counts, largest])
