"""The right answer in fp64, and the verdict on a contender. Knows nothing of fusedclip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.operations import Operation

# 512 KiB of fp64: the few of them that are in use stay in the cache. They are allocated once and written over, since
# fresh memory costs more than the arithmetic (a gigabyte of page faults takes 4 s on some virtual machines).
CHUNK = 1 << 16
EXPONENT_BITS = 0x7FF << 52


@dataclass(frozen=True)
class Bounds:
    """How far a contender may be off: the norm relative to the true one, elements in ulp of the right element.

    `coefficient` widens the elements' bound by that much of the element, for a contender that rounds its norm.
    """

    norm: float
    ulp: float
    coefficient: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What was measured, and the reason for failing, empty if it passed."""

    norm_error: float
    ulp_error: float
    failure: str = ""


def bounds_for(ours: bool, dtype: torch.dtype, elements: int) -> Bounds:
    """fusedclip's bounds are the project's promise; torch's are what it takes to let torch run at all.

    torch returns the norm in the gradients' dtype (relative step 2^-8 in bf16, 2^-11 in fp16), stacks per-tensor norms
    that were rounded the same way, and its fp32 path on the CPU adds up in fp32: 5e-3 off at 2^26 elements. Its
    coefficient inherits all of that and is itself rounded to the dtype. The measured error stands beside every time.
    """
    if ours:
        random_fp32 = dtype == torch.float32 and elements <= 1 << 24
        return Bounds(norm=1e-7 if random_fp32 else 3e-6, ulp=1.5 if dtype == torch.float32 else 1.0)
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return Bounds(norm=1e-2 + rounding, ulp=1.0, coefficient=1e-2 + 2 * rounding)


def chunks(*flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(torch.split(tensor, CHUNK) for tensor in flat), strict=True)


def norm_of(flat: Tensor) -> float:
    """The 2-norm in fp64, chunk sums added exactly."""
    scratch = torch.empty(min(CHUNK, flat.numel()), dtype=torch.float64, device=flat.device)

    def square_sum(part: Tensor) -> float:
        values = scratch[: part.numel()].copy_(part)
        return float(torch.dot(values, values))

    return math.sqrt(math.fsum(square_sum(part) for (part,) in chunks(flat)))


def per_tensor_norms(flat: Tensor, sizes: list[int]) -> Tensor:
    return torch.tensor([norm_of(piece) for piece in torch.split(flat, sizes)], dtype=torch.float64)


def ulp(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The distance between neighbours in `dtype` around each of these fp64 values (subnormals included)."""
    info, out = torch.finfo(dtype), torch.empty_like(values) if out is None else out
    torch.bitwise_and(values.view(torch.int64), EXPONENT_BITS, out=out.view(torch.int64))
    return out.mul_(info.eps).clamp_min_(info.smallest_normal * info.eps)


def judge_norms(got: Tensor, right: Tensor, bound: float) -> Verdict:
    error = (got.detach().double().cpu().reshape(-1) - right).abs() / right
    worst = float(error.max())
    passed = bool((error <= bound).all())
    return Verdict(worst, 0.0, "" if passed else f"norm off by {worst:.1e}, allowed {bound:.0e}")


def judge_elements(before: Tensor, after: Tensor, coefficient: float, bounds: Bounds) -> Verdict:
    """Elements must be `before * coefficient` within the bounds; the same bits where the coefficient is one."""
    scratch = torch.empty(4, min(CHUNK, before.numel()), dtype=torch.float64, device=before.device)
    worst, passed = [0.0], True
    for old, new in chunks(before, after):
        right, unit, error, allowed = (row[: old.numel()] for row in scratch)
        right.copy_(old).mul_(coefficient)
        ulp(right, before.dtype, out=unit)
        error.copy_(new).sub_(right).abs_()
        torch.mul(unit, bounds.ulp, out=allowed).add_(right.abs_(), alpha=bounds.coefficient)
        passed &= bool((error <= allowed).all())
        worst.append(float(error.div_(unit).max()))
    worst_ulp = float(np.max(worst))  # keeps NaN, unlike Python's
    return Verdict(0.0, worst_ulp, "" if passed else f"elements off by {worst_ulp:.2f} ulp, allowed {bounds.ulp}")


def judge_same(right: Tensor, after: Tensor, what: str) -> Verdict:
    """The same values, and no NaN: torch.equal is false for it."""
    return Verdict(0.0, 0.0, "" if torch.equal(right, after) else what)


@dataclass(frozen=True)
class Oracle:
    """The right answers for one workload in one dtype, computed once and used for every operation and contender."""

    before: Tensor
    sizes: list[int]
    norm: float

    @classmethod
    def of(cls, before: Tensor, sizes: list[int]) -> Oracle:
        return cls(before, sizes, norm_of(before))

    def judge(
        self, operation: Operation, limit: float, result: Tensor | None, after: Tensor, bounds: Bounds
    ) -> Verdict:
        """The verdict on what one call returned and on what it made of the gradients."""
        if operation is Operation.VALUE:
            return judge_same(self.before.clamp(-limit, limit), after, "clamped elements differ")
        if result is None:
            return Verdict(math.nan, math.nan, "returned nothing")
        if operation is Operation.PER_TENSOR_NORMS:
            norms = judge_norms(result, per_tensor_norms(self.before, self.sizes), bounds.norm)
        else:
            norms = judge_norms(result, torch.tensor([self.norm], dtype=torch.float64), bounds.norm)
        if operation is Operation.CLIPPED:
            elements = judge_elements(self.before, after, limit / (self.norm + 1e-6), bounds)
        else:
            elements = judge_same(self.before, after, "gradients changed although nothing is to be clipped")
        return Verdict(norms.norm_error, elements.ulp_error, "; ".join(filter(None, (norms.failure, elements.failure))))
