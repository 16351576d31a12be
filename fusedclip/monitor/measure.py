"""What one recorded step measures of each gradient, in one read pass."""

from typing import NamedTuple

from torch import Tensor

from .. import norms, reading
from ..gradients import Gradients


class Found(NamedTuple):
    """fp64. `lifted` is of this rank's gradients, [U]; the others are over the ranks that hold their shards: of the
    entries, [T], 0 for one without a gradient, or of all together, 0-d."""

    lifted: Tensor  # of the order of the norm
    norm: Tensor  # [T]
    nonfinite: Tensor  # [T]: how many elements are NaN or inf
    zeros: Tensor  # 0-d: how many are exactly 0
    largest: Tensor  # 0-d: magnitude


def measure_each(grads: Gradients, p: float) -> Found:
    """Orders whose norm is not among the statistics (2, 1 and inf are) take a read pass of their own."""
    stats = reading.stats_each(grads)
    by_entry, together = reading.stats_of(stats, grads, over_groups=False)
    others = by_entry[norms.NONFINITE], together[norms.ZEROS], together[norms.LARGEST]
    if p in norms.ROWS:
        row = norms.ROWS[p]
        return Found(stats[row], norms.finish(by_entry[row], p), *others)
    lifted = reading.lift_each(grads, p)
    return Found(lifted, reading.norms_of_entries(lifted, grads, p), *others)
