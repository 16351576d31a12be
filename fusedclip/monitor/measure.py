"""What one recorded step measures of each gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import norms, passes
from ..gradients import Gradients


class Found(NamedTuple):
    """Of each gradient, [U], fp64."""

    lifted: Tensor  # of the order of the norm
    zeros: Tensor  # how many elements are exactly 0
    largest: Tensor  # magnitude


def measure_each(grads: Gradients, p: float) -> Found:
    """One read pass; for orders that statistics do not come with, one for each of the three."""
    if p in norms.ROWS:
        found = passes.stats_each(grads)
        return Found(found[norms.ROWS[p]], found[norms.ZEROS], found[norms.LARGEST])
    sizes = torch.tensor([tensor.numel() for tensor in grads.tensors()], dtype=torch.float64, device="cpu")
    lifted, nonzero, largest = (passes.lift_each(grads, order) for order in (p, 0.0, float("inf")))
    return Found(lifted, norms.sent(sizes, nonzero.device) - nonzero, largest)


def by_entry(found: Found, grads: Gradients, p: float) -> Found:
    """The same over the ranks that hold shards, [T], finished; 0 for an entry without a gradient."""
    orders = (p, 1.0, float("inf"))  # counts add up as the norm of order 1
    return Found(
        *(passes.norms_of_entries(of_each, grads, order) for of_each, order in zip(found, orders, strict=True))
    )
