"""The right answer in fp64, and the verdict on a contender. Knows nothing of fusedclip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.operations import Operation

# On the CPU 512 KiB of fp64: the few of them that are in use stay in the cache. They are allocated once and written
# over, since fresh memory costs more than the arithmetic (a gigabyte of page faults takes 4 s on some virtual
# machines). On a GPU launches are what costs.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
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
    yield from zip(*(torch.split(tensor, CHUNK[tensor.device.type]) for tensor in flat), strict=True)


def scratch_for(flat: Tensor, rows: int) -> Tensor:
    """fp64, `rows` times as many elements as the chunks of `flat` have."""
    size = min(CHUNK[flat.device.type], flat.numel())
    return torch.empty(rows, size, dtype=torch.float64, device=flat.device)


def norm_of(flat: Tensor) -> float:
    """The 2-norm in fp64, chunk sums added exactly."""
    (scratch,) = scratch_for(flat, 1)

    def square_sum(part: Tensor) -> float:
        values = scratch[: part.numel()].copy_(part)
        return float(torch.dot(values, values))

    return math.sqrt(math.fsum(square_sum(part) for (part,) in chunks(flat)))


def ulp(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The distance between neighbours in `dtype` around each of these fp64 values (subnormals included)."""
    info, out = torch.finfo(dtype), torch.empty_like(values) if out is None else out
    torch.bitwise_and(values.view(torch.int64), EXPONENT_BITS, out=out.view(torch.int64))
    return out.mul_(info.eps).clamp_min_(info.smallest_normal * info.eps)


Judged = tuple[float, str]  # an error, and the reason for failing


def judge_norms(got: Tensor, right: Tensor, bound: float) -> Judged:
    error = (got.detach().double().cpu().reshape(-1) - right).abs() / right
    worst = float(error.max())
    return worst, "" if bool((error <= bound).all()) else f"norm off by {worst:.1e}, allowed {bound:.0e}"


def judge_elements(before: Tensor, after: Tensor, coefficient: float, bounds: Bounds) -> Judged:
    """Elements must be `before * coefficient` within the bounds; the same bits where the coefficient is one."""
    scratch = scratch_for(before, 4)
    errors, passed = [0.0], True
    for old, new in chunks(before, after):
        right, unit, error, allowed = (row[: old.numel()] for row in scratch)
        right.copy_(old).mul_(coefficient)
        ulp(right, before.dtype, out=unit)
        error.copy_(new).sub_(right).abs_()
        torch.mul(unit, bounds.ulp, out=allowed).add_(right.abs_(), alpha=bounds.coefficient)
        passed &= bool((error <= allowed).all())
        errors.append(float(error.div_(unit).max()))
    worst = float(np.max(errors))  # keeps NaN, unlike Python's
    return worst, "" if passed else f"elements off by {worst:.2f} ulp, allowed {bounds.ulp}"


@dataclass(frozen=True)
class Oracle:
    """The right answers for one workload, computed once and used for every operation and contender.

    Of each dtype the elements stand in one flat tensor; per-tensor norms are known where there is one dtype only.
    """

    before: list[Tensor]
    sizes: list[int]
    norm: float

    @classmethod
    def of(cls, before: list[Tensor], sizes: list[int]) -> "Oracle":
        return cls(before, sizes, math.hypot(*map(norm_of, before)))

    def judge(
        self, operation: Operation, limit: float, result: Tensor | None, after: list[Tensor], ours: bool
    ) -> Verdict:
        """The verdict on what one call returned and on what it made of the gradients."""
        if operation is Operation.VALUE:
            same = all(torch.equal(old.clamp(-limit, limit), new) for old, new in zip(self.before, after, strict=True))
            return Verdict(0.0, 0.0, "" if same else "clamped elements differ")
        if result is None:
            return Verdict(math.nan, math.nan, "returned nothing")
        bounds = [bounds_for(ours, flat.dtype, flat.numel()) for flat in self.before]
        norm_error, failure = judge_norms(result, self._norms(operation), max(one.norm for one in bounds))
        if operation is Operation.CLIPPED:
            coefficient = limit / (self.norm + 1e-6)
            wider = max(one.coefficient for one in bounds)  # a norm is rounded once, for all dtypes
            elements = [
                judge_elements(old, new, coefficient, replace(own, coefficient=wider))
                for old, new, own in zip(self.before, after, bounds, strict=True)
            ]
        else:
            same = all(map(torch.equal, self.before, after))  # false for NaN
            elements = [(0.0, "" if same else "gradients changed although nothing is to be clipped")]
        ulps, failures = zip(*elements, strict=True)
        return Verdict(norm_error, float(np.max(ulps)), "; ".join(filter(None, (failure, *failures))))

    def _norms(self, operation: Operation) -> Tensor:
        if operation is not Operation.PER_TENSOR_NORMS:
            return torch.tensor([self.norm], dtype=torch.float64)
        (flat,) = self.before
        return torch.tensor([norm_of(piece) for piece in torch.split(flat, self.sizes)], dtype=torch.float64)
