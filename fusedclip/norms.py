"""The algebra that every engine speaks, on fp64 tensors: lift, combine, finish; then the coefficient.

    lift     x       -> |x|^p       (|x| for p = inf and -inf, x != 0 for p = 0)
    combine  lifted  -> sum         (a max or min that keeps NaN for p = inf and -inf)
    finish   lifted  -> norm        (the p-th root, once, at the very end)

    coef = min(1, max_norm / (norm + 1e-6))

Nothing here makes the host wait for a device. `csrc/norm_ops.h` is the same page in C++.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .transfers import index_on, on_device

EPS = 1e-6  # torch's, in torch/nn/utils/clip_grad.py

# The rows of lifted statistics, fp64, [5, T]: four sums, and last the largest magnitude, which keeps NaN.
SQUARES, MAGNITUDES, ZEROS, NONFINITE, LARGEST = range(5)
STATS = 5
MODULUS = 1.0  # gathered for this order, a complex element is one number: its modulus
ROWS = {2.0: SQUARES, 1.0: MAGNITUDES, math.inf: LARGEST}  # of the orders whose norm is among them


class Rule(Protocol):
    """How norms become coefficients: any function of fp64 norms, elementwise, on their device and without waiting."""

    @property
    def zero_nonfinite(self) -> bool:
        """Whether a coefficient of 0 stores zeros, so that inf and NaN do not survive as NaN."""

    def __call__(self, norm: Tensor) -> Tensor: ...


class ClipRule(NamedTuple):
    """A limit: the rule that engines know how to fuse."""

    max_norm: float | Tensor  # inf measures: the coefficient is 1 whatever the norm
    zero_nonfinite: bool = False  # a norm that is not finite asks for zeros instead of spreading
    eps: float = EPS

    def __call__(self, norm: Tensor) -> Tensor:
        """min(1, max_norm / (norm + eps)), elementwise and on the norm's device; NaN stays NaN."""
        if isinstance(self.max_norm, float) and self.max_norm == math.inf:
            return torch.ones_like(norm)
        limit = on_device(self.max_norm, norm.device)  # a tensor: torch divides a number by one in two roundings
        coef = (limit / (norm + self.eps)).clamp(max=1.0)
        if self.zero_nonfinite:
            coef = torch.where(norm.isfinite(), coef, 0.0)
        return coef if isinstance(self.max_norm, float) else torch.where(limit == math.inf, 1.0, coef)


class EachRule(ABC):
    """A rule by which each gradient gets a coefficient of its own."""

    zero_nonfinite = False

    @abstractmethod
    def of_each(self, norm: Tensor, by_entry: Tensor) -> Tensor:
        """Coefficients [T] from the norm of all gradients, 0-d, and those of each entry of the list, [T]; 0 for one
        without a gradient."""

    def __call__(self, norm: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} wants the norm of each gradient, and was asked about one of several")


# Making one takes 0.3 us, a tenth of a small call, and a limit is used again and again.
constant_rule = lru_cache(maxsize=64)(ClipRule)


class Clipped(NamedTuple):
    """What a clip knows when it is done: 0-d tensors on the device of the gradients.

    The coefficient may be the engine's own constant: copy it before it gets into anyone's hands.
    """

    norm: Tensor
    coef: Tensor


def runs(places: Sequence[int]) -> list[slice]:
    """Ascending places as a few slices, which unlike an index need not be brought to a device."""
    slices = []
    for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        first, *rest = (place for _, place in run)
        slices.append(slice(first, (rest[-1] if rest else first) + 1))
    return slices


def select(lifted: Tensor, places: Sequence[int]) -> Tensor:
    """The values at ascending places."""
    if not places or places[-1] - places[0] == len(places) - 1:
        return lifted[places[0] : places[-1] + 1] if places else lifted[:0]
    return lifted[index_on(places, lifted.device)]  # one operation: there may be hundreds of runs


def spread(values: Tensor, index: Tensor, none: float = 0.0) -> Tensor:
    """[..., U] values to one per entry of a list, [..., T]: that at its index, `none` where that is -1."""
    last = values.new_full((*values.shape[:-1], 1), none)
    return torch.cat([values, last], -1)[..., index]


def identity(p: float) -> float:
    """The lifted value of no elements at all."""
    return math.inf if p == -math.inf else 0.0


def lift(x: Tensor, p: float) -> Tensor:
    """Elements to lifted values, fp64."""
    if p == 0:
        return (x != 0).double()
    x = x.double().abs()
    return x if math.isinf(p) else x.pow(p)


def counts_tensors(p: float) -> bool:
    """Whether a list's norm takes each tensor's own lifted value, and no multiplier changes it: p = 0, as in torch."""
    return p == 0


def combine(lifted: Tensor, p: float) -> Tensor:
    """The lifted value of a whole list, 0-d, from those of its tensors, [T] with T >= 1.

    torch takes the norm of the tensors' norms; for p = 0 that counts the tensors with any non-zero element.
    """
    return fold(lift(lifted, 0), p) if counts_tensors(p) else merge(lifted, p)


def whole(lifted: Tensor, p: float) -> Tensor:
    """The lifted value of gradients together, 0-d, from those of each, of none as well."""
    return combine(lifted, p) if len(lifted) else lifted.new_full((), identity(p))


def merger(p: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the lifted values of two parts, elementwise."""
    if p == math.inf:
        return torch.maximum
    return torch.minimum if p == -math.inf else torch.add


def merge(lifted: Tensor, p: float) -> Tensor:
    """Lifted values of parts (tensors, devices, ranks), [K], to that of the whole, 0-d."""
    # In order: of more than 32 Ki numbers torch.sum makes a sum per thread of the CPU, and their number would show.
    return lifted.cumsum(0)[-1] if lifted.is_cpu and not math.isinf(p) else fold(lifted, p)


def fold(lifted: Tensor, p: float) -> Tensor:
    """The same of any shape, sums in whichever order torch adds."""
    if math.isinf(p):
        return lifted.amax() if p > 0 else lifted.amin()
    return lifted.sum()


def combine_stats(lifted: Tensor) -> Tensor:
    """The lifted statistics of a whole list, [5], from those of its tensors, [5, T]."""
    if not lifted.shape[1]:
        return lifted.new_zeros(STATS)
    sums = lifted[:LARGEST]
    sums = sums.cumsum(1)[:, -1] if lifted.is_cpu else sums.sum(1)  # in order, as in merge
    return torch.cat([sums, lifted[LARGEST:].amax(1)])


def finish(lifted: Tensor, p: float) -> Tensor:
    """Lifted values to norms, elementwise."""
    if p == 2:
        return lifted.sqrt()
    if p in (0, 1) or math.isinf(p):
        return lifted
    return lifted.pow(1 / p)


def clipped(
    norm: Tensor, p: float, rule: Rule, multiplier: Tensor | None = None, by_entry: Tensor | None = None
) -> Clipped:
    """The norm and the coefficient that clips to the rule; by an `EachRule` those of each entry, from their norms, [T].

    With a multiplier (an inverse loss scale), they are the norm of gradients yet to be multiplied by it, and the
    coefficient that multiplies as well. For p = 0 the norm is a count, which multiplying leaves alone.
    """
    if multiplier is not None:
        multiplier = on_device(multiplier, norm.device)
        if not counts_tensors(p):
            norm, by_entry = norm * multiplier, None if by_entry is None else by_entry * multiplier
    coef = rule.of_each(norm, by_entry) if isinstance(rule, EachRule) and by_entry is not None else rule(norm)
    return Clipped(norm, coef if multiplier is None else coef * multiplier)


def shows_nonfinite(p: float, dtype: torch.dtype) -> bool:
    """Whether the lifted value is finite exactly if all gradients are.

    Orders 0 and -inf hide an inf, negative ones turn it into 0; powers may leave the range of fp64, and so do the sums
    and squares of fp64 gradients (`dtype` is that of results: fp64 if any gradient is).
    """
    return p == math.inf or (p in (1, 2) and dtype != torch.float64)
