"""What one recorded step measures of each gradient, in one read pass."""

from typing import NamedTuple

from torch import Tensor

from .. import norms, passes
from ..gradients import Gradients


class Found(NamedTuple):
    """fp64. `lifted` is of this rank's gradients, [U]; the others are of the entries, [T], over the ranks that hold
    their shards, 0 for one without a gradient."""

    lifted: Tensor  # of the order of the norm
    norm: Tensor
    zeros: Tensor  # how many elements are exactly 0
    largest: Tensor  # magnitude


def measure_each(grads: Gradients, p: float) -> Found:
    """Orders whose norm is not among the statistics (2, 1 and inf are) take a read pass of their own."""
    stats = passes.stats_each(grads)
    by_entry, _ = passes.stats_of(stats, grads, None)
    zeros, largest = by_entry[norms.ZEROS], by_entry[norms.LARGEST]
    if p in norms.ROWS:
        row = norms.ROWS[p]
        return Found(stats[row], norms.finish(by_entry[row], p), zeros, largest)
    lifted = passes.lift_each(grads, p)
    return Found(lifted, passes.norms_of_entries(lifted, grads, p), zeros, largest)
