"""A kernel that reads memory and does as little else as the compiler lets it."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _read(words, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    mixed = tl.zeros((BLOCK,), tl.int64)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        mixed ^= tl.load(words + first + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.xor_sum(mixed, 0))


def read(words: Tensor, out: Tensor, block: int) -> None:
    """out[i] = exclusive or of the words that program i has read; as many programs as `out` has elements.

    The number of words must be a multiple of `block`, and below 2^31.
    """
    if words.numel() % block or words.numel() >= 1 << 31:
        raise ValueError(f"{words.numel()} words are not a multiple of {block} below 2^31")
    _read[(out.numel(),)](words, out, words.numel(), BLOCK=block, num_warps=8)
