"""From a list of parameters to memory: the compiled sweep, and a closer look at what that does not know."""

from .batch import Batch
from .collect import Gradients, Write, from_sweep, gather, gather_given
from .layouts import store
from .shared import refuse_shared, shares_memory

__all__ = [
    "Batch",
    "Gradients",
    "Write",
    "from_sweep",
    "gather",
    "gather_given",
    "refuse_shared",
    "shares_memory",
    "store",
]
