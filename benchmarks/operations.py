"""What is timed: the operations, the limit that each is given, and the bytes that each has to move."""

from __future__ import annotations

from enum import Enum

# Exact in fp32, bf16 and fp16, and close to one standard deviation of the gradients: clips about a third of them.
CLIP_VALUE = 2.0**-10


class Operation(str, Enum):
    """One way of calling the library."""

    NOT_CLIPPED = "not clipped"
    CLIPPED = "clipped"
    VALUE = "clipped by value"
    PER_TENSOR_NORMS = "per-tensor norms"
    NORM = "norm"

    @property
    def writes(self) -> bool:
        """True if the gradients must get their old values back before the next call."""
        return self in (Operation.CLIPPED, Operation.VALUE)

    def limit(self, norm: float) -> float:
        """The limit handed to the call, for gradients of this norm.

        Far from the norm, so that no error of a contender's norm decides whether it clips; the coefficient is not a
        power of two, by which any engine would multiply without rounding.
        """
        if self is Operation.VALUE:
            return CLIP_VALUE
        return norm * (0.6180339887 if self is Operation.CLIPPED else 2.0)


# How often a call moves the gradients' bytes through memory, small reductions left out. torch reads for the norm, then
# reads and writes for the multiplication, which it never skips; its foreach clamp is two passes, its loop one.
PASSES: dict[str, dict[Operation, int]] = {
    "torch foreach": {
        Operation.NOT_CLIPPED: 3,
        Operation.CLIPPED: 3,
        Operation.VALUE: 4,
        Operation.PER_TENSOR_NORMS: 1,
        Operation.NORM: 1,
    },
    "torch loop": {
        Operation.NOT_CLIPPED: 3,
        Operation.CLIPPED: 3,
        Operation.VALUE: 2,
        Operation.PER_TENSOR_NORMS: 1,
        Operation.NORM: 1,
    },
    "apex": {Operation.NOT_CLIPPED: 3, Operation.CLIPPED: 3, Operation.NORM: 1},
    "TransformerEngine": {Operation.NOT_CLIPPED: 3, Operation.CLIPPED: 3, Operation.NORM: 1},
    "torch.compile": {Operation.NOT_CLIPPED: 3, Operation.CLIPPED: 3},
    "fusedclip": {
        Operation.NOT_CLIPPED: 1,
        Operation.CLIPPED: 3,
        Operation.VALUE: 2,
        Operation.PER_TENSOR_NORMS: 1,
        Operation.NORM: 1,
    },
}
