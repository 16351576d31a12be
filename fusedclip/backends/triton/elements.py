"""Elements from and to memory, and the arithmetic of the write pass. Device code only."""

import triton
import triton.language as tl

SCALE, CLAMP = tl.constexpr(0), tl.constexpr(1)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x, A: tl.constexpr):
    """To dtype A. The interpreter (3.9) misreads subnormal bf16, so that it takes the bits."""
    if x.dtype == tl.bfloat16 and INTERPRETED:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(A)


@triton.jit
def narrow(y, T: tl.constexpr):
    """To dtype T, to the nearest even; from fp64 to 16 bits by way of fp32, as torch.

    The interpreter (3.9) truncates to bf16, so that it rounds the bits.
    """
    if T.primitive_bitwidth == 16:
        y = y.to(tl.float32)
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
