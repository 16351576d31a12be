"""Statistics of one tile from one read: the sums, the largest element, and what is counted. Device code only.

The rows are those of fusedclip/norms.py. A step is read in four parts, 16 bytes a thread (Tuning.for_statistics): the
accumulators have as many lanes as a part has elements, so that all four of them fit the registers. After 32 parts they
are added up: as few additions in fp32 as in tiles.py (tuning.MOST_STEPS).
"""

import triton
import triton.language as tl

from ...norms import LARGEST as LAST
from ...norms import STATS
from .elements import widen
from .norms import MAX, NUMBERS, is_trusted, reduce
from .tiles import DTYPES_KNOWN, FLOAT64, cut, gather, lift_ends, type_at

SUM, TWO = tl.constexpr(NUMBERS["one"]), tl.constexpr(NUMBERS["two"])
ROWS, LARGEST = tl.constexpr(STATS), tl.constexpr(LAST)  # those before the largest are sums
ENDS = tl.constexpr(256)  # lanes
PARTS, STEPS = tl.constexpr(4), tl.constexpr(8)  # of a step; of what is added up
NONFINITE = tl.constexpr(1 << 16)  # a lane counts zeros below it, and NaN and inf in its multiples


@triton.jit
def see(x, squares, magnitudes, counts, largest, A: tl.constexpr):
    """The accumulators with what lanes of elements add to them."""
    x = tl.abs(widen(x, A))
    counts += tl.where(x == 0, 1, tl.where(x < float("inf"), 0, NONFINITE))
    return squares + x * x, magnitudes + x, counts, tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold(squares, magnitudes, counts, largest, SIZE: tl.constexpr):
    """The accumulators to one number each, fp64."""
    zeros, nonfinite = tl.sum(counts % NONFINITE, 0), tl.sum(counts // NONFINITE, 0)
    sums = reduce(squares, SUM, SIZE), reduce(magnitudes, SUM, SIZE)
    return sums[0], sums[1], zeros.to(tl.float64), nonfinite.to(tl.float64), reduce(largest, MAX, SIZE)


@triton.jit
def together(a, b):
    """Folded accumulators of two parts to those of both."""
    largest = tl.maximum(a[4], b[4], propagate_nan=tl.PropagateNan.ALL)
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], largest


@triton.jit
def nothing(SIZE: tl.constexpr, A: tl.constexpr):
    """Accumulators of no elements."""
    return tl.full([SIZE], 0, A), tl.full([SIZE], 0, A), tl.full([SIZE], 0, tl.int32), tl.full([SIZE], 0, A)


@triton.jit
def no_stats():
    zero = tl.full([], 0, tl.float64)
    return zero, zero, zero, zero, zero


@triton.jit
def stats_steps(x, steps, A: tl.constexpr, STEP: tl.constexpr):
    LANES: tl.constexpr = STEP // PARTS
    lanes = tl.arange(0, LANES)
    total = no_stats()
    for first in range(0, steps, STEPS):
        squares, magnitudes, counts, largest = nothing(LANES, A)
        for i in range(first, tl.minimum(first + STEPS, steps)):
            for part in tl.static_range(PARTS):
                values = tl.load(x + (i * STEP + part * LANES) + lanes)
                squares, magnitudes, counts, largest = see(values, squares, magnitudes, counts, largest, A)
        total = together(total, fold(squares, magnitudes, counts, largest, LANES))
    return total


@triton.jit
def stats_ends(x, begin, head_end, tail, end, A: tl.constexpr):
    """Of elements [begin, head_end) and [tail, end), each shorter than a step."""
    lanes = tl.arange(0, ENDS)
    squares, magnitudes, counts, largest = nothing(ENDS, A)
    outside = 0  # lanes that read a zero which is none
    for piece in range(2):
        first = tl.where(piece == 0, begin, tail)
        left = (tl.where(piece == 0, head_end, end) - first).to(tl.int32)
        for done in range(0, left, ENDS):
            values = tl.load(x + first + done + lanes, mask=done + lanes < left, other=0)
            squares, magnitudes, counts, largest = see(values, squares, magnitudes, counts, largest, A)
            outside += tl.maximum(done + ENDS - left, 0)
    squares, magnitudes, zeros, nonfinite, largest = fold(squares, magnitudes, counts, largest, ENDS)
    return squares, magnitudes, zeros - outside, nonfinite, largest


@triton.jit
def stats_tile(
    address,
    count,
    index,
    T: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    x = address.to(tl.pointer_type(T))
    begin, start, steps, tail, end = cut(address, count, index, T, TILE_BYTES, STEP_BYTES)
    # Where a result is fp64, 16-bit gradients are still summed in fp32: their accumulators would take all registers.
    A: tl.constexpr = tl.float64 if FLOAT64 & DTYPES and T.primitive_bitwidth > 16 else tl.float32
    STEP: tl.constexpr = STEP_BYTES * 8 // T.primitive_bitwidth
    stats = stats_steps(tl.multiple_of(x + start, 16), steps, A, STEP)
    if (begin < start) | (tail < end):
        stats = together(stats, stats_ends(x, begin, start, tail, end, A))
    squares, magnitudes, zeros, nonfinite, largest = stats
    if A == tl.float32:
        if (largest != 0) & (not is_trusted(squares)):
            squares = lift_ends(x, begin, end, end, end, 0, TWO, tl.float64)
        if not (magnitudes < float("inf")):  # no magnitude is lost for being small
            magnitudes = lift_ends(x, begin, end, end, end, 0, SUM, tl.float64)
    return squares, magnitudes, zeros, nonfinite, largest


@triton.jit
def stats_any(
    address,
    count,
    index,
    dtype,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    stats = no_stats()
    for place in tl.static_range(DTYPES_KNOWN):
        if (1 << place) & DTYPES:
            if dtype == (1 << place):
                stats = stats_tile(address, count, index, type_at(place), DTYPES, TILE_BYTES, STEP_BYTES)
    return stats


@triton.jit
def gather_row(partials, begin, end, row: tl.constexpr):
    """One row of the statistics of tiles [begin, end), combined."""
    if row == LARGEST:
        return gather(partials, begin, end, MAX)
    else:
        return gather(partials, begin, end, SUM)
