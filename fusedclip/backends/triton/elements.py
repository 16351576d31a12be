"""The algebra of norms.py on blocks of elements, and the arithmetic of the write pass. Device code only."""

import triton
import triton.language as tl

ZERO, ONE, TWO, POWER, MAX, MIN = (tl.constexpr(code) for code in range(6))  # norms
LEAST_TRUSTED = tl.constexpr(2.0**-90)
SCALE, CLAMP = tl.constexpr(0), tl.constexpr(1)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def identity(NORM: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr):
    if NORM == MIN:
        return tl.full([SIZE], float("inf"), A)
    else:
        return tl.full([SIZE], 0, A)


@triton.jit
def scalar_identity(NORM: tl.constexpr):
    if NORM == MIN:
        return tl.full([], float("inf"), tl.float64)
    else:
        return tl.full([], 0, tl.float64)


@triton.jit
def widen(x, A: tl.constexpr):
    """To dtype A. The interpreter (3.9) misreads subnormal bf16, so that it takes the bits."""
    if x.dtype == tl.bfloat16 and INTERPRETED:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(A)


@triton.jit
def lift(x, p, NORM: tl.constexpr, A: tl.constexpr):
    """In the accumulator's dtype, which for a count may be narrower than that of x."""
    if NORM == ZERO:
        OWN: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
        return tl.where(widen(x, OWN) != 0, 1.0, 0.0).to(A)
    x = tl.abs(widen(x, A))
    if NORM == TWO:
        return x * x
    elif NORM == POWER:
        return tl.exp2(p * tl.log2(x))  # in fp64: off by 2e-13 at most
    else:
        return x


@triton.jit
def combine(a, b, NORM: tl.constexpr):
    if NORM == MAX:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NORM == MIN:
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return a + b


@triton.jit
def reduce(x, NORM: tl.constexpr, SIZE: tl.constexpr):
    """[SIZE] lifted values to one, fp64.

    Sums: 8 terms in the accumulator's dtype within a thread, the rest in fp64. Extremes: tl.max and tl.min drop NaN,
    so compare bits instead. Magnitudes order like their bits read as integers, with NaN above inf, and -1 is a NaN.
    """
    if NORM == MAX or NORM == MIN:
        INT: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
        bits = tl.abs(x).to(INT, bitcast=True)
        if NORM == MAX:
            extreme = tl.max(bits, 0)
        else:
            extreme = tl.min(tl.where(x != x, -1, bits), 0)
        return extreme.to(x.dtype, bitcast=True).to(tl.float64)
    else:
        rows = tl.reshape(x, [8, SIZE // 8])
        return tl.sum(tl.sum(rows, 0).to(tl.float64), 0)


@triton.jit
def finish(lifted, p, NORM: tl.constexpr):
    if NORM == TWO:
        return tl.sqrt(lifted)
    elif NORM == POWER:
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
    if NORM != ZERO:  # a count stays what it is
        norm *= multiplier
    ratio = limit / (norm + tl.full([], EPS, tl.float64))
    coef = tl.where(ratio >= 1, 1.0, ratio)  # NaN stays NaN
    if ZEROS:
        coef = tl.where(norm - norm == 0, coef, 0.0)
    return norm, tl.where(limit == float("inf"), 1.0, coef) * multiplier


@triton.jit
def narrow(y, T: tl.constexpr):
    """To dtype T, to the nearest even. The interpreter (3.9) truncates to bf16, so that it rounds the bits."""
    if T == tl.bfloat16 and INTERPRETED:
        bits = y.to(tl.uint32, bitcast=True)
        nearest = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(T)


@triton.jit
def float_factors(coef):
    """A coefficient in two fp32 factors, to be applied in this order: csrc/norm_ops.h has the reasons."""
    power = tl.where(coef < 2.0**-64, 2.0**-64, tl.where(coef > 2.0**100, 2.0**100, 1.0)).to(tl.float64)
    power = tl.where(coef < 2.0**-190, 2.0**-149, power)
    power = tl.where(coef > 0, power, 1.0)
    rest = tl.where((coef > 0) & (coef < 2.0**-298), 2.0**-149, coef / power)
    return rest.to(tl.float32), power.to(tl.float32)


@triton.jit
def apply(x, operand, T: tl.constexpr, OP: tl.constexpr, ZEROS: tl.constexpr):
    A: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    x = widen(x, A)
    if OP == SCALE:
        if A == tl.float64:
            y = x * operand
        else:
            rest, power = float_factors(operand)
            y = x * rest * power
        if ZEROS:
            y = tl.where(operand == 0, 0.0, y)
    else:
        bound = widen(narrow(operand.to(A), T), A)
        y = tl.maximum(x, 0 - bound, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, bound, propagate_nan=tl.PropagateNan.ALL)
    return narrow(y, T)
