"""The read pass, and what it tells: of each gradient, of each entry of the list, of all together over all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import norms
from ._extension import subnormals_count
from .backends import serving
from .gradients import Batch, Gradients
from .transfers import index_on, sent


def lift_each(grads: Gradients, p: float, *, alone: bool = False) -> Tensor:
    """Lifted value of each gradient, fp64, in the order of the batches, on the first gradient's device.

    Of DTensors that of this rank's shard; partial ones are summed over their ranks first, but for `alone`.
    """
    return _joined([serving(batch).lift(batch, p) for batch in _reads(grads, p, alone)], grads, torch.Size([0]))


def stats_each(grads: Gradients) -> Tensor:
    """Lifted statistics of each gradient, fp64, [5, U] with the rows of norms.py; the rest as of `lift_each`."""
    parts = [serving(batch).stats(batch) for batch in _reads(grads, 1.0, alone=False)]
    return _joined(parts, grads, torch.Size([norms.STATS, 0]))


def _reads(grads: Gradients, p: float, alone: bool) -> list[Batch]:
    if alone or grads.shards is None or not grads.shards.plan.partials or not grads.reads:
        return grads.reads
    from .distributed import sum_partials  # not before it is asked for: a build of torch may lack it

    return sum_partials(grads, p)


def _joined(parts: list[Tensor], grads: Gradients, empty: torch.Size) -> Tensor:
    """What each batch gave, along the last dimension."""
    if not parts:
        return torch.empty(empty, dtype=torch.float64, device=grads.device)
    return parts[0] if len(parts) == 1 else torch.cat([part.to(grads.device) for part in parts], -1)


def total(lifted: Tensor, p: float, grads: Gradients) -> Tensor:
    """The lifted value of the whole list, 0-d, over all ranks."""
    return norms.whole(lifted, p) if grads.is_local else totals(lifted, p, grads, None)[0]


def totals(
    lifted: Tensor, p: float, grads: Gradients, scopes: Sequence[Sequence[int]] | None, label: str = ""
) -> Tensor:
    """That of each scope (its entries), [S]. Ranks with different labels get an error."""
    from . import distributed

    return distributed.totals(_counted_here(lifted, norms.identity(p), grads), p, grads, scopes, label)


def stats_of(lifted: Tensor, grads: Gradients, *, over_groups: bool = True) -> tuple[Tensor, Tensor]:
    """Of lifted statistics those of each entry, [5, T], 0 for one without a gradient; and of all together, [5].

    Over the ranks that hold their shards: of the whole gradients. Of all together also over the groups of ranks that
    hold others, unless that is not wanted.
    """
    groups = grads.groups if over_groups else ()
    counted, by_entry = _counted_here(lifted, 0.0, grads) if groups else lifted, spread(lifted, grads)
    if grads.each_is_local and not groups:
        return by_entry, norms.combine_stats(counted)
    from . import distributed

    return distributed.stats_over_ranks(counted, by_entry, grads, groups)


def _counted_here(lifted: Tensor, identity: float, grads: Gradients) -> Tensor:
    """Lifted values, [..., U], with the identity for what another rank counts."""
    if not grads.uncounted:
        return lifted
    lifted = lifted.clone()
    for run in norms.runs(sorted({grads.sources[entry] for entry in grads.uncounted} - {-1})):
        lifted[..., run] = identity
    return lifted


def norm_of_each(grads: Gradients, p: float) -> tuple[Tensor, Tensor]:
    """The norm of each gradient, over the ranks that hold its shards, in fp64: by place, [U], and by entry, [T].

    An entry without a gradient has 0.
    """
    lifted = lift_each(grads, p)
    by_entry = norms_of_entries(lifted, grads, p)
    if grads.each_is_local:
        return norms.finish(lifted, p), by_entry
    return by_entry[index_on(first_entries(grads), by_entry.device)], by_entry


def norms_of_entries(lifted: Tensor, grads: Gradients, p: float) -> Tensor:
    """From the lifted values of each gradient, [U], the norm of each entry over the ranks that hold its shards, [T]."""
    if grads.each_is_local:
        return spread(norms.finish(lifted, p), grads)
    from . import distributed

    return norms.finish(distributed.each_over_ranks(lifted, p, grads), p)


def first_entries(grads: Gradients) -> list[int]:
    """Of each place, the first entry of the list that has it."""
    entry_of = {place: entry for entry, place in reversed(list(enumerate(grads.sources)))}
    return [entry_of[place] for place in range(len(grads))]


def spread(values: Tensor, grads: Gradients) -> Tensor:
    """[..., U] values in the order of the batches to one per entry of the list; 0 for an entry without a gradient."""
    sources = grads.packed_sources
    if sources is None:
        return values
    return norms.spread(values, sent(torch.frombuffer(sources, dtype=torch.int64), values.device))


def as_result(exact: Tensor, grads: Gradients) -> Tensor:
    """fp64 values in the dtype of results."""
    return rounded(exact, grads.dtype)


def rounded(exact: Tensor, dtype: torch.dtype, *, finite: bool = False) -> Tensor:
    """fp64 values in a dtype; subnormals, too, whatever torch does with them. `finite`: as they are, if they would
    leave its range."""
    if exact.dtype == dtype:
        return exact
    with subnormals_count(exact.device, threads=1):
        rounded = exact.to(dtype)
    return exact if finite and not rounded.isfinite() else rounded


def raise_if_nonfinite(norm: Tensor, lifted: Tensor, grads: Gradients, p: float) -> None:
    """Judges unrounded norms: the same on all ranks, whatever dtype each of them returns it in."""
    if norm.isfinite().all():
        return
    values = norms.finish(lifted, p).tolist()
    bad = [place for place, value in enumerate(values) if not -float("inf") < value < float("inf")]
    shown = ", ".join(f"{grads.name(place)} ({values[place]})" for place in bad[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    where = f"The culprits are {shown}{more}." if bad else "Every tensor here has a finite norm of its own."
    raise RuntimeError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite ({norm.tolist()}), so it cannot be "
        f"clipped. {where} No gradient has been changed. To clip anyway, set `error_if_nonfinite=False`; "
        "on_nonfinite='zero' then stores zeros instead of NaN"
    )
