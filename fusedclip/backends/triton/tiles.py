"""One tile of one segment: where it is, reading it, writing it. Device code only.

A tile is up to TILE_BYTES and begins on a 16-byte boundary of memory: what a segment has before its first boundary
belongs to its first tile. So whole steps of STEP_BYTES are loaded and stored 16 bytes at a time without a mask,
wherever the segment lies, and only its ends are masked.
"""

import torch
import triton
import triton.language as tl

from ...dtypes import LIST, name_of
from .elements import apply
from .norms import MAX, combine, fact, identity, is_trusted, lift, reduce, scalar_identity

# Dtypes: a bit each, in the order of the list. Kernels are told those that occur and have no branches for the others.
CODES = {dtype: 1 << place for place, dtype in enumerate(LIST)}
TYPES = tl.constexpr(tuple(getattr(tl, name_of(dtype)) for dtype in LIST))
DTYPES_KNOWN, FLOAT64 = tl.constexpr(len(LIST)), tl.constexpr(CODES[torch.float64])
DTYPE_BITS, DTYPE_MASK = tl.constexpr(len(LIST)), tl.constexpr((1 << len(LIST)) - 1)
BLOCK = tl.constexpr(1024)  # elements per masked load: 8 fp64 accumulators per thread of 4 warps


@triton.constexpr_function
def type_at(place):
    return TYPES.value[place]


@triton.jit
def locate(table, segments, tile):
    """Of a tile: its segment, which of that one's tiles it is, and the segment's address, element count and dtype."""
    word = tl.load(table + 2 * segments + tile)
    segment = word >> 32
    shape = tl.load(table + segments + segment)
    return segment, word & 0xFFFFFFFF, tl.load(table + segment), shape >> DTYPE_BITS, shape & DTYPE_MASK


@triton.jit
def cut(address, count, index, T: tl.constexpr, TILE_BYTES: tl.constexpr, STEP_BYTES: tl.constexpr):
    """Where a tile begins, where its whole steps begin and end, and where it ends, in elements of its segment."""
    ITEM: tl.constexpr = T.primitive_bitwidth // 8
    head = ((0 - address) & 15) // ITEM
    start = index * (TILE_BYTES // ITEM) + head
    end = tl.minimum(start + TILE_BYTES // ITEM, count)
    begin = tl.where(index == 0, 0, start)
    steps = (tl.maximum(end - start, 0) // (STEP_BYTES // ITEM)).to(tl.int32)
    return begin, tl.minimum(start, count), steps, tl.minimum(start, count) + steps * (STEP_BYTES // ITEM), end


@triton.jit
def lift_steps(x, steps, NORM: tl.constexpr, A: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    lifted = identity(NORM, LANES, A)
    for i in range(steps):
        for part in tl.static_range(STEP // LANES):
            values = tl.load(x + (i * STEP + part * LANES) + lanes)
            lifted = combine(lifted, lift(values, 0, NORM, A), NORM)
    return reduce(lifted, NORM, LANES)


@triton.jit
def lift_ends(x, begin, head_end, tail, end, p, NORM: tl.constexpr, A: tl.constexpr):
    """Elements [begin, head_end) and [tail, end)."""
    lanes = tl.arange(0, BLOCK)
    lifted = identity(NORM, BLOCK, A)
    for piece in range(2):
        first = tl.where(piece == 0, begin, tail)
        left = (tl.where(piece == 0, head_end, end) - first).to(tl.int32)  # of one tile: fits
        for done in range(0, left, BLOCK):
            inside = done + lanes < left
            values = tl.load(x + first + done + lanes, mask=inside, other=0)
            values = tl.where(inside, lift(values, p, NORM, A), identity(NORM, BLOCK, A))
            lifted = combine(lifted, values, NORM)
    return reduce(lifted, NORM, BLOCK)


@triton.jit
def lift_tile(
    address,
    count,
    index,
    p,
    T: tl.constexpr,
    NORM: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """Its lifted value, fp64. Summed in fp32 first, unless there are fp64 gradients and so an fp64 norm."""
    x = address.to(tl.pointer_type(T))
    begin, start, steps, tail, end = cut(address, count, index, T, TILE_BYTES, STEP_BYTES)
    COUNTS: tl.constexpr = fact(NORM, "counts")
    A: tl.constexpr = tl.float64 if FLOAT64 & DTYPES and not COUNTS else tl.float32
    STEP: tl.constexpr = STEP_BYTES * 8 // T.primitive_bitwidth
    # Accumulators take no more registers than a step's loads. Half of that for counts, whose comparisons take many.
    MOST: tl.constexpr = STEP_BYTES * (4 if COUNTS else 8) // A.primitive_bitwidth
    LANES: tl.constexpr = STEP if STEP < MOST else MOST
    if fact(NORM, "in_double"):  # bound by arithmetic, not by memory
        lifted = lift_ends(x, begin, end, end, end, p, NORM, tl.float64)
    else:
        lifted = lift_steps(tl.multiple_of(x + start, 16), steps, NORM, A, STEP, LANES)
        if (begin < start) | (tail < end):
            lifted = combine(lifted, lift_ends(x, begin, start, tail, end, p, NORM, A), NORM)
        if fact(NORM, "combining") == "sum" and not COUNTS and A == tl.float32:
            if not is_trusted(lifted):
                # Zeros are common in embedding gradients and must not pay for fp64; this read comes from the cache.
                if lift_ends(x, begin, end, end, end, p, MAX, A) != 0:
                    lifted = lift_ends(x, begin, end, end, end, p, NORM, tl.float64)
    return lifted


@triton.jit
def lift_any(
    address,
    count,
    index,
    dtype,
    p,
    NORM: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    lifted = scalar_identity(NORM)
    for place in tl.static_range(DTYPES_KNOWN):
        if (1 << place) & DTYPES:
            if dtype == (1 << place):
                lifted = lift_tile(address, count, index, p, type_at(place), NORM, DTYPES, TILE_BYTES, STEP_BYTES)
    return lifted


@triton.jit
def gather(partials, begin, end, NORM: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    lifted = identity(NORM, BLOCK, tl.float64)
    for at in range(begin, end, BLOCK):
        inside = at + lanes < end
        values = tl.load(partials + at + lanes, mask=inside, other=0)
        lifted = combine(lifted, tl.where(inside, values, identity(NORM, BLOCK, tl.float64)), NORM)
    return reduce(lifted, NORM, BLOCK)


@triton.jit
def write_tile(
    address,
    count,
    index,
    operand,
    T: tl.constexpr,
    OP: tl.constexpr,
    ZEROS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    x = address.to(tl.pointer_type(T))
    begin, start, steps, tail, end = cut(address, count, index, T, TILE_BYTES, STEP_BYTES)
    STEP: tl.constexpr = STEP_BYTES * 8 // T.primitive_bitwidth
    whole = tl.multiple_of(x + start, 16)
    for i in range(steps):
        at = whole + i * STEP + tl.arange(0, STEP)
        tl.store(at, apply(tl.load(at), operand, T, OP, ZEROS))
    lanes = tl.arange(0, BLOCK)
    for piece in range(2):
        first = tl.where(piece == 0, begin, tail)
        left = (tl.where(piece == 0, start, end) - first).to(tl.int32)
        for done in range(0, left, BLOCK):
            at = x + first + done + lanes
            inside = done + lanes < left
            tl.store(at, apply(tl.load(at, mask=inside, other=0), operand, T, OP, ZEROS), mask=inside)


@triton.jit
def write_any(
    address,
    count,
    index,
    dtype,
    operand,
    OP: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    for place in tl.static_range(DTYPES_KNOWN):
        if (1 << place) & DTYPES:
            if dtype == (1 << place):
                write_tile(address, count, index, operand, type_at(place), OP, ZEROS, TILE_BYTES, STEP_BYTES)
