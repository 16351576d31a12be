"""The norms, a row each, and the algebra of fusedclip/norms.py on blocks of elements. Device code, but for the table.

A kernel is told a norm's number in `NORMS` and asks for its row while it is compiled.
"""

import math
from typing import Literal, NamedTuple

import triton
import triton.language as tl

from .elements import widen

LEAST_TRUSTED = tl.constexpr(2.0**-90)


class Norm(NamedTuple):
    """All that there is to say about a norm. By default it is right, if perhaps not the fastest (csrc/norms.h)."""

    order: float  # nan: of every order that no other is for
    combining: Literal["sum", "max", "min"] = "sum"
    root: Literal["of order", "square", "none"] = "of order"
    counts: bool = False  # ones and zeros: exact in fp32, and no multiplier changes their sum
    in_double: bool = False  # lifted in fp64 whatever the dtype, and told p: bound by arithmetic, not by memory


NORMS = {
    "zero": Norm(0.0, root="none", counts=True),
    "one": Norm(1.0, root="none"),
    "two": Norm(2.0, root="square"),
    "power": Norm(math.nan, in_double=True),
    "max": Norm(math.inf, "max", "none"),
    "min": Norm(-math.inf, "min", "none"),
}
NUMBERS = {name: number for number, name in enumerate(NORMS)}
MAX = tl.constexpr(NUMBERS["max"])
_ROWS = tl.constexpr(tuple(NORMS.values()))  # as such it is part of what Triton caches kernels by
_BY_ORDER = {norm.order: NUMBERS[name] for name, norm in NORMS.items()}


def number_of(p: float) -> int:
    return _BY_ORDER.get(p, NUMBERS["power"])


@triton.constexpr_function
def fact(NORM, name):
    """An entry of the norm's row."""
    return getattr(_ROWS.value[NORM], name)


@triton.jit
def identity(NORM: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr):
    if fact(NORM, "combining") == "min":
        return tl.full([SIZE], float("inf"), A)
    else:
        return tl.full([SIZE], 0, A)


@triton.jit
def scalar_identity(NORM: tl.constexpr):
    if fact(NORM, "combining") == "min":
        return tl.full([], float("inf"), tl.float64)
    else:
        return tl.full([], 0, tl.float64)


@triton.jit
def lift(x, p, NORM: tl.constexpr, A: tl.constexpr):
    """In the accumulator's dtype, which for a count may be narrower than that of x."""
    if fact(NORM, "counts"):
        OWN: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
        return tl.where(widen(x, OWN) != 0, 1.0, 0.0).to(A)
    elif fact(NORM, "in_double"):
        return tl.exp2(p * tl.log2(tl.abs(widen(x, A))))  # off by 2e-13 at most
    elif fact(NORM, "order") == 2:
        x = widen(x, A)
        return x * x
    elif fact(NORM, "order") == 1 or fact(NORM, "combining") != "sum":
        return tl.abs(widen(x, A))
    else:
        tl.static_assert(False, "lift() does not know this norm")
        return x


@triton.jit
def combine(a, b, NORM: tl.constexpr):
    if fact(NORM, "combining") == "max":
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif fact(NORM, "combining") == "min":
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def reduce(x, NORM: tl.constexpr, SIZE: tl.constexpr):
    """[SIZE] lifted values to one, fp64.

    Sums: 8 terms in the accumulator's dtype within a thread, the rest in fp64. Extremes: tl.max and tl.min drop NaN,
    so compare bits instead. Magnitudes order like their bits read as integers, with NaN above inf, and -1 is a NaN.
    """
    if fact(NORM, "combining") != "sum":
        INT: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
        bits = tl.abs(x).to(INT, bitcast=True)
        if fact(NORM, "combining") == "max":
            extreme = tl.max(bits, 0)
        else:
            extreme = tl.min(tl.where(x != x, -1, bits), 0)
        return extreme.to(x.dtype, bitcast=True).to(tl.float64)
    else:
        rows = tl.reshape(x, [8, SIZE // 8])
        return tl.sum(tl.sum(rows, 0).to(tl.float64), 0)


@triton.jit
def finish(lifted, p, NORM: tl.constexpr):
    if fact(NORM, "root") == "square":
        return tl.sqrt(lifted)
    elif fact(NORM, "root") == "of order":
        return tl.exp2(tl.log2(lifted) / p)
    else:
        return lifted


@triton.jit
def is_trusted(sum):
    """Whether an fp32 sum may be taken as it is (csrc/norm_ops.h)."""
    return (sum >= LEAST_TRUSTED) & (sum < float("inf"))


@triton.jit
def settle(lifted, p, limit, multiplier, EPS: tl.constexpr, NORM: tl.constexpr, ZEROS: tl.constexpr):
    """Norm and coefficient of the elements times `multiplier`, which the coefficient contains (csrc/norm_ops.h)."""
    norm = finish(lifted, p, NORM)
    if not fact(NORM, "counts"):  # a count stays what it is
        norm *= multiplier
    ratio = limit / (norm + tl.full([], EPS, tl.float64))
    coef = tl.where(ratio >= 1, 1.0, ratio)  # NaN stays NaN
    if ZEROS:
        coef = tl.where(norm - norm == 0, coef, 0.0)
    return norm, tl.where(limit == float("inf"), 1.0, coef) * multiplier
