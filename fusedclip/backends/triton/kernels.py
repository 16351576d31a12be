"""The Triton kernels: the read pass, what finishes it, and the conditional write pass. Device code only.

The grid is fixed per device and program b takes tiles b, b + programs, ...: the read pass leaves one partial per
program however long the list is, and a few hundred partials are what every program of the write pass adds up again, in
the same order. No atomics, and the same bits each time.
"""

import triton
import triton.language as tl

from .elements import CLAMP, SCALE
from .norms import combine, finish, scalar_identity, settle
from .stats import ROWS, gather_row, stats_any
from .tiles import gather, lift_any, locate, write_any


@triton.jit(do_not_specialize=["segments", "tiles"])
def read_kernel(
    table,
    partials,
    p: tl.float64,
    segments,
    tiles,
    NORM: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_TILE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """partials[program], or partials[tile]: the lifted values that it read."""
    total = scalar_identity(NORM)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, index, address, count, dtype = locate(table, segments, tile)
        lifted = lift_any(address, count, index, dtype, p, NORM, DTYPES, TILE_BYTES, STEP_BYTES)
        if PER_TILE:
            tl.store(partials + tile, lifted)
        else:
            total = combine(total, lifted, NORM)
    if not PER_TILE:
        tl.store(partials + tl.program_id(0), total)


@triton.jit(do_not_specialize=["segments", "tiles"])
def per_tensor_kernel(table, partials, out, segments, tiles, NORM: tl.constexpr):
    """out[segment]: the partials of its tiles combined. One program per segment."""
    first_tile = table + 2 * segments + tiles + tl.program_id(0)
    lifted = gather(partials, tl.load(first_tile), tl.load(first_tile + 1), NORM)
    tl.store(out + tl.program_id(0), lifted)


@triton.jit(do_not_specialize=["segments", "tiles"])
def stats_kernel(
    table,
    partials,
    segments,
    tiles,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """partials[row, tile]: the statistics of every tile."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, index, address, count, dtype = locate(table, segments, tile)
        stats = stats_any(address, count, index, dtype, DTYPES, TILE_BYTES, STEP_BYTES)
        for row in tl.static_range(ROWS):
            tl.store(partials + row * tiles + tile, stats[row])


@triton.jit(do_not_specialize=["segments", "tiles"])
def per_tensor_stats_kernel(table, partials, out, segments, tiles):
    """out[row, segment]: those of its tiles combined. One program per segment."""
    first_tile = table + 2 * segments + tiles + tl.program_id(0)
    begin, end = tl.load(first_tile), tl.load(first_tile + 1)
    for row in tl.static_range(ROWS):
        tl.store(out + row * segments + tl.program_id(0), gather_row(partials + row * tiles, begin, end, row))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(partials, out, p: tl.float64, count, NORM: tl.constexpr):
    norm = finish(gather(partials, 0, count, NORM), p, NORM)
    tl.store(out, norm.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["segments", "tiles"])
def scale_kernel(
    table,
    coefs,
    segments,
    tiles,
    PER_TENSOR: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        segment, index, address, count, dtype = locate(table, segments, tiles - 1 - i)
        coef = tl.load(coefs + segment * PER_TENSOR)
        if coef != 1:
            write_any(address, count, index, dtype, coef, SCALE, ZEROS, DTYPES, TILE_BYTES, STEP_BYTES)


@triton.jit(do_not_specialize=["segments", "tiles"])
def clamp_kernel(
    table, bound: tl.float64, segments, tiles, DTYPES: tl.constexpr, TILE_BYTES: tl.constexpr, STEP_BYTES: tl.constexpr
):
    bound = tl.full([], 0, tl.float64) + bound
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _, index, address, count, dtype = locate(table, segments, i)
        write_any(address, count, index, dtype, bound, CLAMP, False, DTYPES, TILE_BYTES, STEP_BYTES)


@triton.jit(do_not_specialize=["segments", "tiles", "partial_count"])
def settle_and_scale_kernel(
    table,
    partials,
    norm_out,
    coef_out,
    max_norm: tl.float64,
    max_norm_on_device,  # a 0-d tensor that replaces max_norm, or None
    multiplier,  # a 0-d tensor, or None
    p: tl.float64,
    segments,
    tiles,
    partial_count,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """Norm and coefficient, which every program works out for itself, and the write pass unless the coefficient is 1.

    Backwards: what the read pass saw last is still in the cache.
    """
    factor = tl.full([], 1, tl.float64)
    if multiplier is not None:
        factor = tl.load(multiplier).to(tl.float64)
    limit = tl.full([], 0, tl.float64) + max_norm
    if max_norm_on_device is not None:
        limit = tl.load(max_norm_on_device).to(tl.float64)
    norm, coef = settle(gather(partials, 0, partial_count, NORM), p, limit, factor, EPS, NORM, ZEROS)
    if tl.program_id(0) == 0:
        tl.store(norm_out, norm.to(norm_out.dtype.element_ty))
        tl.store(coef_out, coef)
    if coef != 1:
        for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _, index, address, count, dtype = locate(table, segments, tiles - 1 - i)
            write_any(address, count, index, dtype, coef, SCALE, ZEROS, DTYPES, TILE_BYTES, STEP_BYTES)
