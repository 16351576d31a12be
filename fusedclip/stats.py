"""What gradients look like, from the read pass that measures their norm: the largest element, zeros, NaN and inf."""

from dataclasses import dataclass
from typing import Literal, SupportsFloat

import torch
from torch import Tensor

from . import norms, passes, reading
from .arguments import Limit, Tensors, as_list, check_max_norm, check_norm_type, on_nonfinite_is, parameter_list
from .gradients import Gradients, gather, gather_given
from .norms import ClipRule
from .peers import Elsewhere, Group, check_group
from .torch_internals import outside_graphs, refuse_tracing


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """Five statistics, on the device of the first gradient. Of a complex element the modulus counts."""

    norm: Tensor  # fp32 (fp64 if any gradient is); NaN and inf as in get_total_norm, in the next two as well
    abs_sum: Tensor  # of all |x|: with the number of elements it gives their mean
    abs_max: Tensor  # the largest |x|
    zeros: Tensor  # int64: how many elements are exactly 0, of those that a sparse tensor stores
    nonfinite: Tensor  # int64: how many are NaN or inf


@dataclass(frozen=True, slots=True, eq=False)
class GradStats(Stats):
    """Of each gradient by itself, [T]: one per entry of the list, 0 for one without a gradient. And of all together."""

    total: Stats  # each 0-d


@outside_graphs
def get_grad_stats(tensors: Tensors, norm_type: SupportsFloat | str = 2.0, *, group: Group | None = None) -> GradStats:
    """Norm, sum and maximum of the magnitudes, and the number of zeros and of NaN and inf, of each tensor and of all
    together, from one read pass and without waiting for the device.

    Equivalent::

        norm, abs_sum, abs_max = (get_per_tensor_norms(tensors, p) for p in (norm_type, 1, inf))
        zeros = torch.stack([(t == 0).sum() for t in tensors])
        nonfinite = torch.stack([t.isfinite().logical_not().sum() for t in tensors])

    Args:
        tensors: as of `get_total_norm`: gradients, not parameters.
        norm_type: the order of `norm`: 2, 1 or inf, which one read gives beside the rest.
        group: `total` is taken over all ranks of this process group (or of several), too: two all-reduces. Of DTensors
            each entry is that of the whole tensor, after two all-reduces per set of ranks. Every rank must call.

    Returns:
        `GradStats`. A tensor listed twice has two entries and counts once in `total`.

    Raises:
        TypeError, ValueError: naming the culprit.

    Deterministic as `clip_grad_norm_` is.
    """
    refuse_tracing()
    p = _check_order(norm_type)
    peers = check_group(group)
    grads = gather(as_list(tensors, "tensors"), None, p=norms.MODULUS, peers=peers)
    return as_stats(*finished(*reading.stats_of(reading.stats_each(grads), grads), grads, p))


@outside_graphs
def clip_grad_norm_with_stats_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: SupportsFloat | str = 2.0,
    error_if_nonfinite: bool = False,
    *,
    on_nonfinite: Literal["propagate", "zero"] = "propagate",
    group: Group | None = None,
    counted_elsewhere: Elsewhere | None = None,
    grad_attr: str = "grad",
) -> GradStats:
    """`clip_grad_norm_`, and `get_grad_stats` of the gradients before clipping, from the same read pass.

    Args:
        parameters, max_norm, error_if_nonfinite, on_nonfinite, counted_elsewhere, grad_attr: as of `clip_grad_norm_`.
        norm_type: 2, 1 or inf.
        group: as of `clip_grad_norm_`, and of `get_grad_stats`: `total` is that of all ranks.

    Returns:
        `GradStats`: its `total.norm` is what `clip_grad_norm_` returns. One entry per parameter in the order given, 0
        for one without a gradient. Does not wait for the device unless `error_if_nonfinite`.

    Raises:
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.
    """
    refuse_tracing()
    p, limit = _check_order(norm_type), check_max_norm(max_norm)
    rule = ClipRule(limit, on_nonfinite_is("zero", on_nonfinite))
    peers = check_group(group, counted_elsewhere)
    grads = gather_given(parameter_list(parameters, grad_attr), grad_attr, p=norms.MODULUS, peers=peers)
    return as_stats(*finished(*clip_with_stats_(grads, p, rule, error_if_nonfinite), grads, p))


def clip_with_stats_(
    grads: Gradients, p: float, rule: ClipRule, error_if_nonfinite: bool = False
) -> tuple[Tensor, Tensor]:
    """The same of gradients that have been gathered, giving lifted statistics: [5, T] and [5]."""
    lifted, row = reading.stats_each(grads), norms.ROWS[p]
    by_entry, total = reading.stats_of(lifted, grads)
    norm = norms.finish(total[row], p)
    if error_if_nonfinite:
        reading.raise_if_nonfinite(norm, lifted[row], grads, p)
    passes.scale_(grads, rule(norm), zero=rule.zero_nonfinite)
    return by_entry, total


def _check_order(norm_type: SupportsFloat | str) -> float:
    p = check_norm_type(norm_type)
    if p not in norms.ROWS:
        raise ValueError(
            f"norm_type is {p}; statistics come with a norm of order 2, 1 or inf, which one read gives. For other "
            "orders call get_per_tensor_norms or get_total_norm beside them"
        )
    return p


def finished(by_entry: Tensor, total: Tensor, grads: Gradients, p: float) -> tuple[Tensor, Tensor]:
    """Lifted statistics, [5, T] and [5], as magnitudes, [3, T + 1], and counts, [2, T + 1], those of all last."""
    lifted = torch.cat([by_entry, total.unsqueeze(1)], 1)
    norm = norms.finish(lifted[norms.ROWS[p]], p)
    magnitudes = reading.as_result(torch.stack([norm, lifted[norms.MAGNITUDES], lifted[norms.LARGEST]]), grads)
    counts = lifted[norms.ZEROS : norms.NONFINITE + 1].round().long()  # of replicas each rank counts a part
    return magnitudes, counts


def as_stats(magnitudes: Tensor, counts: Tensor) -> GradStats:
    """As what the caller is given."""
    norm, abs_sum, abs_max, zeros, nonfinite = *magnitudes.unbind(), *counts.unbind()
    together = Stats(norm[-1], abs_sum[-1], abs_max[-1], zeros[-1], nonfinite[-1])
    return GradStats(norm[:-1], abs_sum[:-1], abs_max[:-1], zeros[:-1], nonfinite[:-1], together)
