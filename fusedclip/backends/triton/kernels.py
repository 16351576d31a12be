"""The Triton kernels: the read pass, what finishes it, and the conditional write pass. Device code only.

The grid is fixed per device and program b takes chunks b, b + programs, ...: the read pass leaves one partial per
program however long the list is, and a few hundred partials are what every program of the write pass adds up again, in
the same order. No atomics, and the same bits each time.
"""

import triton
import triton.language as tl

from .chunks import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, gather, lift_chunk, locate, write_any
from .elements import CLAMP, SCALE, ZERO, combine, finish, scalar_identity


@triton.jit(do_not_specialize=["tensors", "chunks"])
def read_kernel(
    table,
    partials,
    p: tl.float64,
    tensors,
    chunks,
    NORM: tl.constexpr,
    DTYPES: tl.constexpr,  # those that occur: branches of the others are not compiled
    PER_CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """partials[program], or partials[chunk]: the lifted values that it read."""
    total = scalar_identity(NORM)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, index, address, count, dtype = locate(table, tensors, chunk)
        lifted = scalar_identity(NORM)
        if FLOAT32 & DTYPES:
            if dtype == FLOAT32:
                lifted = lift_chunk(address, count, index, p, tl.float32, NORM, DTYPES, CHUNK_BYTES, STEP_BYTES)
        if FLOAT64 & DTYPES:
            if dtype == FLOAT64:
                lifted = lift_chunk(address, count, index, p, tl.float64, NORM, DTYPES, CHUNK_BYTES, STEP_BYTES)
        if BFLOAT16 & DTYPES:
            if dtype == BFLOAT16:
                lifted = lift_chunk(address, count, index, p, tl.bfloat16, NORM, DTYPES, CHUNK_BYTES, STEP_BYTES)
        if FLOAT16 & DTYPES:
            if dtype == FLOAT16:
                lifted = lift_chunk(address, count, index, p, tl.float16, NORM, DTYPES, CHUNK_BYTES, STEP_BYTES)
        if PER_CHUNK:
            tl.store(partials + chunk, lifted)
        else:
            total = combine(total, lifted, NORM)
    if not PER_CHUNK:
        tl.store(partials + tl.program_id(0), total)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def per_tensor_kernel(table, partials, out, tensors, chunks, NORM: tl.constexpr):
    """out[tensor]: the partials of its chunks combined. One program per tensor."""
    first_chunk = table + 2 * tensors + chunks + tl.program_id(0)
    lifted = gather(partials, tl.load(first_chunk), tl.load(first_chunk + 1), NORM)
    tl.store(out + tl.program_id(0), lifted)


@triton.jit(do_not_specialize=["count"])
def norm_kernel(partials, out, p: tl.float64, count, NORM: tl.constexpr):
    norm = finish(gather(partials, 0, count, NORM), p, NORM)
    tl.store(out, norm.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["tensors", "chunks"])
def scale_kernel(
    table,
    coefs,
    tensors,
    chunks,
    PER_TENSOR: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPES: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor, index, address, count, dtype = locate(table, tensors, chunks - 1 - i)
        coef = tl.load(coefs + tensor * PER_TENSOR)
        if coef != 1:
            write_any(address, count, index, dtype, coef, SCALE, ZEROS, DTYPES, CHUNK_BYTES, STEP_BYTES)


@triton.jit(do_not_specialize=["tensors", "chunks"])
def clamp_kernel(
    table,
    bound: tl.float64,
    tensors,
    chunks,
    DTYPES: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    bound = tl.full([], 0, tl.float64) + bound
    for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, index, address, count, dtype = locate(table, tensors, i)
        write_any(address, count, index, dtype, bound, CLAMP, False, DTYPES, CHUNK_BYTES, STEP_BYTES)


@triton.jit(do_not_specialize=["tensors", "chunks", "partial_count"])
def clip_kernel(
    table,
    partials,
    norm_out,
    coef_out,
    max_norm: tl.float64,
    max_norm_on_device,  # a 0-d tensor that replaces max_norm, or None
    multiplier,  # a 0-d tensor, or None
    p: tl.float64,
    tensors,
    chunks,
    partial_count,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    ZEROS: tl.constexpr,
    DTYPES: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    STEP_BYTES: tl.constexpr,
):
    """Norm and coefficient, which every program works out for itself, and the write pass unless the coefficient is 1.

    Backwards: what the read pass saw last is still in the cache.
    """
    norm = finish(gather(partials, 0, partial_count, NORM), p, NORM)
    factor = tl.full([], 1, tl.float64)
    if multiplier is not None:
        factor = tl.load(multiplier).to(tl.float64)
        if NORM != ZERO:  # a count stays what it is
            norm *= factor
    limit = tl.full([], 0, tl.float64) + max_norm
    if max_norm_on_device is not None:
        limit = tl.load(max_norm_on_device).to(tl.float64)
    ratio = limit / (norm + tl.full([], EPS, tl.float64))
    coef = tl.where(ratio >= 1, 1.0, ratio)  # NaN stays NaN
    if ZEROS:
        coef = tl.where(norm - norm == 0, coef, 0.0)
    coef = tl.where(limit == float("inf"), 1.0, coef) * factor
    if tl.program_id(0) == 0:
        tl.store(norm_out, norm.to(norm_out.dtype.element_ty))
        tl.store(coef_out, coef)
    if coef != 1:
        for i in range(tl.program_id(0), chunks, tl.num_programs(0)):
            _, index, address, count, dtype = locate(table, tensors, chunks - 1 - i)
            write_any(address, count, index, dtype, coef, SCALE, ZEROS, DTYPES, CHUNK_BYTES, STEP_BYTES)
