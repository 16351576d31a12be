"""The right answer in fp64, and the verdict on a contender. Knows nothing of fusedclip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.gradients import Gradients
from benchmarks.suites import Operation

# On the CPU 512 KiB of fp64: the few of them that are in use stay in the cache, and come from the heap. Larger ones are
# fresh memory each time, which costs more than the arithmetic (a gigabyte of page faults takes 4 s on some virtual
# machines). On a GPU launches are what costs.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
EXPONENT_BITS = 0x7FF << 52


@dataclass(frozen=True)
class Verdict:
    """What was measured, and the reason for failing, empty if it passed."""

    norm_error: float = math.nan
    ulp_error: float = math.nan
    failure: str = ""


def bounds_for(ours: bool, dtype: torch.dtype, elements: int) -> tuple[float, float, float]:
    """How far a norm may be off, relative to the true one, and elements: in ulp of the right element, and besides by
    how much of themselves, for a contender that rounds its norm.

    fusedclip's bounds are the project's promise; torch's are what it takes to let torch run at all.
    torch returns the norm in the gradients' dtype (relative step 2^-8 in bf16, 2^-11 in fp16), stacks per-tensor norms
    that were rounded the same way, and its fp32 path on the CPU adds up in fp32: 5e-3 off at 2^26 elements. Its
    coefficient inherits all of that and is itself rounded to the dtype. The measured error stands beside every time.
    """
    if ours:
        random_fp32 = dtype == torch.float32 and elements <= 1 << 24
        return 1e-7 if random_fp32 else 3e-6, 1.5 if dtype == torch.float32 else 1.0, 0.0
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return 1e-2 + rounding, 1.0, 1e-2 + 2 * rounding


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(one.flatten(), CHUNK[one.device.type]) for one in tensors), strict=True)


def norm_of(tensor: Tensor) -> float:
    """The 2-norm in fp64, chunk sums added exactly."""
    values = (part.double() for (part,) in chunks(tensor))
    return math.sqrt(math.fsum(float(torch.dot(one, one)) for one in values))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours in `dtype` around each of these fp64 values (subnormals included)."""
    info, powers = torch.finfo(dtype), (values.view(torch.int64) & EXPONENT_BITS).view(torch.float64)
    return powers.mul_(info.eps).clamp_min_(info.smallest_normal * info.eps)


def judge_elements(before: Tensor, after: Tensor, coefficient: float, ulps: float, wider: float) -> tuple[float, str]:
    """Elements must be `before * coefficient` within so many ulp, and `wider` times themselves: the largest error in
    ulp, and the reason for failing.
    """
    errors, passed = [0.0], True
    for old, new in chunks(before, after):
        right = old.double().mul_(coefficient)
        unit, error = ulp(right, before.dtype), new.double().sub_(right).abs_()
        passed &= bool((error <= right.abs_().mul_(wider).add_(unit, alpha=ulps)).all())
        errors.append(float(error.div_(unit).max()))
    worst = float(np.max(errors))  # keeps NaN, unlike Python's
    return worst, "" if passed else f"elements off by {worst:.2f} ulp, allowed {ulps}"


class Oracle:
    """Gradients to work on, and the right answers for them: computed once, used for all operations and contenders."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients, self.norms = gradients, [norm_of(one) for one in gradients.saved]
        self.norm = math.hypot(*self.norms)

    def judge(self, operation: Operation, limit: float, result: Tensor | None, ours: bool) -> Verdict:
        """The verdict on what one call returned and on what it made of the gradients."""
        before = self.gradients.saved
        pairs = list(zip(before, self.gradients.tensors, strict=True))
        if operation is Operation.VALUE:
            same = all(torch.equal(old.clamp(-limit, limit), new) for old, new in pairs)
            return Verdict(0.0, 0.0, "" if same else "clamped elements differ")
        if result is None:
            return Verdict(failure="returned nothing")
        elements = self.gradients.workload.elements
        bounds = {dtype: bounds_for(ours, dtype, elements) for dtype in {one.dtype for one in before}}
        bound, _, wider = map(max, zip(*bounds.values(), strict=True))  # a norm is rounded once, for all dtypes
        right = self.norms if operation is Operation.PER_TENSOR_NORMS else [self.norm]
        exact = torch.tensor(right, dtype=torch.float64)
        errors, ulps = (result.detach().double().cpu().reshape(-1) - exact).abs() / exact, [0.0]
        worst = float(errors.max())
        reasons = [] if bool((errors <= bound).all()) else [f"norm off by {worst:.1e}, allowed {bound:.0e}"]
        if operation is Operation.CLIPPED:
            coefficient = limit / (self.norm + 1e-6)
            judged = [judge_elements(old, new, coefficient, bounds[old.dtype][1], wider) for old, new in pairs]
            ulps = [ulp for ulp, _ in judged]
            reasons += [failure for _, failure in judged if failure][:1]
        elif not all(torch.equal(old, new) for old, new in pairs):  # NaN is not
            reasons.append("gradients changed although nothing is to be clipped")
        return Verdict(worst, float(np.max(ulps)), "; ".join(reasons))
