"""The Triton kernels of an optimizer's step. Device code only.

As `csrc/cuda/update.cuh`: one launch finds the numbers that are the same for all elements of a segment, and counts its
step; the next moves the elements, reading every stream once and writing all but the gradient. The dtypes of the streams
are the launch's, so that there are no branches for others; rules are those of fusedclip/updates.py.
"""

import triton
import triton.language as tl

from .elements import float_factors, narrow, widen
from .tiles import DTYPE_BITS, type_at

NUMBERS = tl.constexpr(9)  # that a segment is told: two factors of the gradient, up to seven of the rule
WHOLE, SPLIT = tl.constexpr(1), tl.constexpr(2)  # what is kept beside the parameter; 0: nothing


@triton.constexpr_function
def is_adamw(kind):
    return kind.startswith("adamw")


@triton.jit
def power(base, exponent):
    """base^exponent, for a whole number; fp64."""
    result = tl.full([], 1, tl.float64)
    left = exponent.to(tl.int64)
    while left > 0:
        if left & 1 == 1:
            result *= base
        base *= base
        left >>= 1
    return result


@triton.jit
def is_skipped(skip):
    if skip is None:
        return False
    else:
        return tl.load(skip) != 0


@triton.jit(do_not_specialize=["segments"])
def prepare_kernel(
    table,
    prepared,
    coef,
    skip,  # or None
    lr_on_device,  # a 0-d tensor that replaces lr, or None
    lr: tl.float64,
    second: tl.float64,  # the rule's options, in their order
    third: tl.float64,
    fourth: tl.float64,
    fifth: tl.float64,
    segments,
    KIND: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    IN_DOUBLE: tl.constexpr,
    STEPS: tl.constexpr,  # which of the streams they are, or None
):
    """prepared[segment]: its numbers, fp64. One program per segment."""
    segment, zero = tl.program_id(0), tl.full([], 0, tl.float64)
    step = zero + 1
    if not is_skipped(skip):
        if STEPS is not None:
            counter = tl.load(table + STEPS * segments + segment).to(tl.pointer_type(tl.float32))
            taken = tl.load(counter) + 1
            tl.store(counter, taken)
            step = taken.to(tl.float64)
        rate = zero + lr
        if lr_on_device is not None:
            rate = tl.load(lr_on_device)
        to = prepared + segment * NUMBERS
        factor = tl.load(coef)
        if IN_DOUBLE:
            rest, power_of_two = factor, zero + 1
        else:
            rest, power_of_two = float_factors(factor)
        tl.store(to, 0 - rest if MAXIMIZE else rest)
        tl.store(to + 1, power_of_two)
        a, b, c, d = zero + second, zero + third, zero + fourth, zero + fifth
        if is_adamw(KIND):  # beta1, beta2, eps, weight decay
            root = tl.sqrt(1 - power(b, step))
            tl.store(to + 2, 1 - rate * d)
            tl.store(to + 3, a)
            tl.store(to + 4, 1 - a)
            tl.store(to + 5, b)
            tl.store(to + 6, 1 - b)
            tl.store(to + 7, rate / (1 - power(a, step)) * root)
            tl.store(to + 8, c * root)
        else:  # momentum, dampening, weight decay
            later = tl.where(step > 1, 1.0, 0.0).to(tl.float64)
            tl.store(to + 2, rate)
            tl.store(to + 3, a)
            tl.store(to + 4, a * later)
            tl.store(to + 5, 1 - b * later)
            tl.store(to + 6, c)


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def move(x, g, first, second, third, to, KIND: tl.constexpr):
    """The next value and states; `to`: the numbers of the rule, in the arithmetic's dtype."""
    if is_adamw(KIND):
        decay, beta1, weight1, beta2, weight2, scale, floor = to
        x = x * decay
        first = tl.where(weight1 < 0.5, first + (g - first) * weight1, g - (g - first) * beta1)
        second = second * beta2 + (g * weight2) * g
        if KIND == "adamw_amsgrad":
            third = tl.maximum(third, second, propagate_nan=tl.PropagateNan.ALL)
            root = sqrt(third)
        else:
            root = sqrt(second)
        x = x - divide(first * scale, root + floor)
    else:
        lr, momentum, kept, taken, weight_decay, _, _ = to
        g = tl.where(weight_decay != 0, g + x * weight_decay, g)
        if KIND != "sgd":
            first = first * kept + g * taken
            if KIND == "sgd_nesterov":
                g = g + first * momentum
            else:
                g = first
        x = x - g * lr
    return x, first, second, third


@triton.jit
def join(parameter, remainder):
    """The bits of a bf16 parameter and of its remainder to their master."""
    high, low = parameter.to(tl.int32), remainder.to(tl.int32) & 0xFFFF
    carry = tl.where((high & 0x7FFF) != 0, low >> 15, 0)
    return (((high - carry) << 16) | low).to(tl.float32, bitcast=True)


@triton.jit
def round_away(master):
    bits = master.to(tl.int32, bitcast=True)
    return tl.where(master == master, (bits + 0x8000) >> 16, (bits >> 16) | 0x40).to(tl.int16)


@triton.jit
def remainder_of(master):
    return tl.where(master == master, master.to(tl.int32, bitcast=True) & 0xFFFF, 0).to(tl.int16)


@triton.jit
def fetch(address, at, mask, T: tl.constexpr, ALIGNED: tl.constexpr):
    x = address.to(tl.pointer_type(T))
    if ALIGNED:
        return tl.load(tl.multiple_of(x, 16) + at)
    else:
        return tl.load(x + at, mask=mask, other=0)


@triton.jit
def put(address, at, mask, values, T: tl.constexpr, ALIGNED: tl.constexpr):
    x = address.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(x, 16) + at, values)
    else:
        tl.store(x + at, values, mask=mask)


@triton.jit
def move_lanes(
    addresses,
    at,
    mask,
    rest,
    power_of_two,
    to,
    KIND: tl.constexpr,
    TYPES: tl.constexpr,
    STATES: tl.constexpr,
    KEPT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    P: tl.constexpr = type_at(TYPES[0])
    A: tl.constexpr = tl.float64 if P == tl.float64 else tl.float32
    if KEPT == SPLIT:
        high = fetch(addresses[0], at, mask, tl.int16, ALIGNED)
        value = join(high, fetch(addresses[2 + STATES], at, mask, tl.int16, ALIGNED))
    elif KEPT == WHOLE:
        value = fetch(addresses[2 + STATES], at, mask, tl.float32, ALIGNED)
    else:
        value = fetch(addresses[0], at, mask, P, ALIGNED)
    gradient = fetch(addresses[1], at, mask, type_at(TYPES[1]), ALIGNED)
    first, second, third = gradient, gradient, gradient  # where there are fewer: not used
    if STATES > 0:
        first = fetch(addresses[2], at, mask, type_at(TYPES[2]), ALIGNED)
    if STATES > 1:
        second = fetch(addresses[3], at, mask, type_at(TYPES[3]), ALIGNED)
    if STATES > 2:
        third = fetch(addresses[4], at, mask, type_at(TYPES[4]), ALIGNED)

    g = widen(gradient, A) * rest * power_of_two
    x, first, second, third = move(widen(value, A), g, widen(first, A), widen(second, A), widen(third, A), to, KIND)

    if STATES > 0:
        put(addresses[2], at, mask, narrow(first, type_at(TYPES[2])), type_at(TYPES[2]), ALIGNED)
    if STATES > 1:
        put(addresses[3], at, mask, narrow(second, type_at(TYPES[3])), type_at(TYPES[3]), ALIGNED)
    if STATES > 2:
        put(addresses[4], at, mask, narrow(third, type_at(TYPES[4])), type_at(TYPES[4]), ALIGNED)
    if KEPT == SPLIT:
        put(addresses[2 + STATES], at, mask, remainder_of(x), tl.int16, ALIGNED)
    elif KEPT == WHOLE:
        put(addresses[2 + STATES], at, mask, x, tl.float32, ALIGNED)
    if KEPT != 0 and P == tl.bfloat16:
        put(addresses[0], at, mask, round_away(x), tl.int16, ALIGNED)
    else:
        put(addresses[0], at, mask, narrow(x, P), P, ALIGNED)


@triton.jit(do_not_specialize=["segments", "tiles"])
def update_kernel(
    table,
    prepared,
    skip,  # or None
    segments,
    tiles,
    KIND: tl.constexpr,
    TYPES: tl.constexpr,  # of parameter, gradient and states: places in dtypes.LIST
    KEPT: tl.constexpr,
    STREAMS: tl.constexpr,  # addresses that the table has of a segment
    STEP: tl.constexpr,  # elements
    TILE: tl.constexpr,
):
    """Backwards: the gradients that the norm has read last are still in the cache."""
    STATES: tl.constexpr = len(TYPES) - 2
    USED: tl.constexpr = 2 + STATES + (1 if KEPT != 0 else 0)
    A: tl.constexpr = tl.float64 if type_at(TYPES[0]) == tl.float64 else tl.float32
    if not is_skipped(skip):
        for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
            word = tl.load(table + (STREAMS + 1) * segments + tiles - 1 - i)
            segment, index = word >> 32, word & 0xFFFFFFFF
            count = tl.load(table + STREAMS * segments + segment) >> DTYPE_BITS
            addresses = ()
            bits = tl.full([], 0, tl.int64)
            for stream in tl.static_range(USED):
                address = tl.load(table + stream * segments + segment)
                addresses = addresses + (address,)
                bits |= address
            to = ()
            for number in tl.static_range(NUMBERS):
                to = to + (tl.load(prepared + segment * NUMBERS + number).to(A),)
            rest, power_of_two = to[0], to[1]
            rule = (to[2], to[3], to[4], to[5], to[6], to[7], to[8])
            begin, end = index * TILE, tl.minimum(index * TILE + TILE, count)
            steps = tl.where(bits & 15 == 0, (end - begin) // STEP, 0).to(tl.int32)
            lanes = tl.arange(0, STEP)
            for step in range(steps):
                at = begin + step * STEP + lanes
                move_lanes(addresses, at, None, rest, power_of_two, rule, KIND, TYPES, STATES, KEPT, True)
            for first in range(begin + steps * STEP, end, STEP):
                at = first + lanes
                move_lanes(addresses, at, at < end, rest, power_of_two, rule, KIND, TYPES, STATES, KEPT, False)
