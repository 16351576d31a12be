"""What is timed: the operations, and the limit that each is given."""

from enum import Enum

# Exact in fp32, bf16 and fp16, and close to one standard deviation of the gradients: clips about a third of them.
CLIP_VALUE = 2.0**-10
# Limits over the norm. Far from 1, so that no error of a contender's norm decides whether it clips; the coefficient is
# not a power of two, by which any engine would multiply without rounding.
LOOSE, TIGHT = 2.0, 0.6180339887


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
        """The limit handed to the call, for gradients of this norm."""
        if self is Operation.VALUE:
            return CLIP_VALUE
        return norm * (TIGHT if self is Operation.CLIPPED else LOOSE)
