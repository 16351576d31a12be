"""The one door to the engines: gradients are measured, a rule makes a coefficient of that, the gradients are scaled.

clip_list_       all of it for a list, in one call of the extension where nothing stands between the two passes
scale_list_      the write pass for a list whose norm is known, in one call as well
clip_            all of it for gradients that have been gathered
measure, norm    all of it but the write pass
lift_each        the read pass
stats_each       the read pass that counts and looks for the largest element on its way
scale_, clamp_   the write pass

Everything is checked before the first write. Autograd is told of what was written, and stand-ins of gradients are
brought home, here alone, and also when an interrupt arrives while an engine writes.
"""

import math
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from . import backends, norms
from ._extension import subnormals_count
from .arguments import Peers, explain_no_gradients
from .backends import Backend, Written, serving
from .gradients import Batch, Gradients, Write, from_sweep, gather, refuse_shared
from .norms import Clipped, ClipRule, EachRule, Rule
from .torch_internals import as_torch, increment_version


def clip_list_(
    items: list[Tensor],
    attribute: str | None,
    p: float,
    rule: ClipRule,
    error_if_nonfinite: bool,
    peers: Peers | None,
) -> Tensor:
    """The norm of the gradients of `items`, which are clipped; or of the items themselves, if `attribute` is None."""
    engine = backends.for_lists() if peers is None and type(rule.max_norm) is float else None
    if engine is not None:
        written: list[Tensor] = []
        try:
            found = engine.clip_list_(items, attribute, p, rule, error_if_nonfinite, written)
        finally:
            if written:
                increment_version(written)
        if type(found) is Tensor:
            return found
        grads = from_sweep(items, found, attribute)
    else:
        grads = gather(items, attribute, p=p)
    if attribute is None:
        return handed_out(norm(grads, p, error_if_nonfinite=error_if_nonfinite, peers=peers), grads)
    if not grads.reads:
        explain_no_gradients(items, attribute)
    return handed_out(clip_(grads, p, rule, error_if_nonfinite=error_if_nonfinite, peers=peers).norm, grads)


def scale_list_(items: list[Tensor], attribute: str, rule: ClipRule, norm: float | Tensor) -> None:
    """The gradients of `items` are clipped as the rule says of this norm."""
    engine = backends.for_lists() if type(rule.max_norm) is float else None
    if engine is not None and type(norm) is float:
        written: list[Tensor] = []
        try:
            found = engine.scale_list_(items, attribute, rule, norm, written)
        finally:
            if written:
                increment_version(written)
        if found is None:
            return
        grads = from_sweep(items, found, attribute)
    else:
        grads = gather(items, attribute)
    if not grads.reads:
        explain_no_gradients(items, attribute)
    scale_(grads, rule(norms.on_device(norm, grads.device)), zero=rule.zero_nonfinite)


def handed_out(norm: Tensor, grads: Gradients) -> Tensor:
    """As it is, or as a DTensor to callers of torch's function where torch returns one."""
    if grads.shards is None or not as_torch.get():
        return norm
    from .distributed import replicated

    return replicated(norm, grads.shards)


def clip_(
    grads: Gradients,
    p: float,
    rule: Rule,
    *,
    error_if_nonfinite: bool = False,
    peers: Peers | None = None,
    multiplier: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Clipped:
    """Clip to the rule; the norm is in `dtype`, that of results unless given.

    `multiplier` (0-d, on any device): the gradients are multiplied by it as well, in the same write pass; norm and rule
    are those of the product.
    """
    engine = _fusing(grads, p, error_if_nonfinite)
    if engine is None or not isinstance(rule, ClipRule) or grads.writes[0].places is not None:
        exact, coef = measure(grads, p, rule, error_if_nonfinite=error_if_nonfinite, peers=peers, multiplier=multiplier)
        scale_(grads, coef, zero=rule.zero_nonfinite)
        return Clipped(rounded(exact, dtype or grads.dtype, finite=error_if_nonfinite), coef)
    there = None if multiplier is None else multiplier.to(grads.device)
    lifted = None if stays_here(grads, peers) else total(lift_each(grads, p), p, grads, peers)
    with _Writing(grads, 0, engine) as writing:
        clipped, writing.written = engine.clip_(
            writing.write.batch, p, rule, dtype or grads.dtype, multiplier=there, lifted=lifted
        )
    return clipped


def _fusing(grads: Gradients, p: float, error_if_nonfinite: bool) -> Backend | None:
    """The engine that can do all of it at once, or all but the read pass, if there is one."""
    if error_if_nonfinite or len(grads.reads) != 1:
        return None
    engine = serving(grads.reads[0])
    return engine if engine.fuses(p) else None


def measure(
    grads: Gradients,
    p: float,
    rule: Rule,
    *,
    error_if_nonfinite: bool = False,
    peers: Peers | None = None,
    multiplier: Tensor | None = None,
) -> Clipped:
    """What `clip_` does but for the write pass: the coefficient is for someone else to apply. The norm is in fp64."""
    if not grads.reads and stays_here(grads, peers):
        return Clipped(_nothing().double(), torch.ones((), dtype=torch.float64, device="cpu"))
    engine = _fusing(grads, p, error_if_nonfinite) if stays_here(grads, peers) else None
    if engine is not None and not isinstance(rule, EachRule):
        return norms.clipped(engine.norm(grads.reads[0], p, torch.float64), p, rule, multiplier)
    lifted = lift_each(grads, p)
    return clipped_by(lifted, grads, p, rule, error_if_nonfinite=error_if_nonfinite, peers=peers, multiplier=multiplier)


def clipped_by(
    lifted: Tensor,
    grads: Gradients,
    p: float,
    rule: Rule,
    *,
    error_if_nonfinite: bool = False,
    peers: Peers | None = None,
    multiplier: Tensor | None = None,
) -> Clipped:
    """The same of gradients that have been read."""
    exact = _exact_norm(lifted, grads, p, error_if_nonfinite, peers)
    if isinstance(rule, EachRule):
        return _clipped_each(exact, norms_of_entries(lifted, grads, p), grads, p, rule, multiplier)
    return norms.clipped(exact, p, rule, multiplier)


def _clipped_each(
    norm: Tensor, by_entry: Tensor, grads: Gradients, p: float, rule: EachRule, multiplier: Tensor | None
) -> Clipped:
    """`norms.clipped` with a coefficient for each gradient, [U]."""
    if multiplier is not None:
        multiplier = norms.on_device(multiplier, norm.device)
        if not norms.counts_tensors(p):
            norm, by_entry = norm * multiplier, by_entry * multiplier
    coef = rule.of_each(norm, by_entry)
    if grads.packed_sources is not None:
        coef = coef[norms.index_on(first_entries(grads), coef.device)]
    return Clipped(norm, coef if multiplier is None else coef * multiplier)


def norm(grads: Gradients, p: float, *, error_if_nonfinite: bool, peers: Peers | None) -> Tensor:
    """The norm of all gradients, in the dtype of results. Waits for the device only if `error_if_nonfinite`."""
    if not grads.reads and stays_here(grads, peers):
        return _nothing()
    engine = _fusing(grads, p, error_if_nonfinite) if stays_here(grads, peers) else None
    if engine is not None:
        return engine.norm(grads.reads[0], p, grads.dtype)
    exact = _exact_norm(lift_each(grads, p), grads, p, error_if_nonfinite, peers)
    return as_result(exact, grads, finite=error_if_nonfinite)


def _exact_norm(lifted: Tensor, grads: Gradients, p: float, error_if_nonfinite: bool, peers: Peers | None) -> Tensor:
    exact = norms.finish(total(lifted, p, grads, peers), p)
    if error_if_nonfinite:
        raise_if_nonfinite(exact, lifted, grads, p)
    return exact


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


def stays_here(grads: Gradients, peers: Peers | None) -> bool:
    """Whether this rank's gradients are all there are."""
    return peers is None and (grads.shards is None or grads.shards.plan.is_local)


def total(lifted: Tensor, p: float, grads: Gradients, peers: Peers | None) -> Tensor:
    """The lifted value of the whole list, 0-d, over all ranks."""
    return norms.whole(lifted, p) if stays_here(grads, peers) else totals(lifted, p, grads, peers, None)[0]


def totals(
    lifted: Tensor,
    p: float,
    grads: Gradients,
    peers: Peers | None,
    scopes: Sequence[Sequence[int]] | None,
    label: str = "",
) -> Tensor:
    """That of each scope (its entries), [S]. Ranks with different labels get an error."""
    from . import distributed

    lifted = _counted_here(lifted, norms.identity(p), grads, peers)
    return distributed.totals(lifted, p, grads, () if peers is None else peers.groups, scopes, label)


def stats_of(lifted: Tensor, grads: Gradients, peers: Peers | None) -> tuple[Tensor, Tensor]:
    """Of lifted statistics those of each entry, [5, T], 0 for one without a gradient; and of all together, [5].

    Over the ranks that hold their shards: of the whole gradients. Of all together also over the groups of `peers`.
    """
    counted, by_entry = _counted_here(lifted, 0.0, grads, peers), spread(lifted, grads)
    if stays_here(grads, peers):
        return by_entry, norms.combine_stats(counted)
    from . import distributed

    return distributed.stats_over_ranks(counted, by_entry, grads, () if peers is None else peers.groups)


def _counted_here(lifted: Tensor, identity: float, grads: Gradients, peers: Peers | None) -> Tensor:
    """Lifted values, [..., U], with the identity for what another rank counts."""
    if peers is None or not peers.uncounted:
        return lifted
    lifted = lifted.clone()
    for run in norms.runs(sorted({grads.sources[entry] for entry in peers.uncounted} - {-1})):
        lifted[..., run] = identity
    return lifted


def norm_of_each(grads: Gradients, p: float) -> tuple[Tensor, Tensor]:
    """The norm of each gradient, over the ranks that hold its shards, in fp64: by place, [U], and by entry, [T].

    An entry without a gradient has 0.
    """
    lifted = lift_each(grads, p)
    by_entry = norms_of_entries(lifted, grads, p)
    if stays_here(grads, None):
        return norms.finish(lifted, p), by_entry
    return by_entry[norms.index_on(first_entries(grads), by_entry.device)], by_entry


def norms_of_entries(lifted: Tensor, grads: Gradients, p: float) -> Tensor:
    """From the lifted values of each gradient, [U], the norm of each entry over the ranks that hold its shards, [T]."""
    if stays_here(grads, None):
        return spread(norms.finish(lifted, p), grads)
    from . import distributed

    return norms.finish(distributed.each_over_ranks(lifted, p, grads), p)


def first_entries(grads: Gradients) -> list[int]:
    """Of each place, the first entry of the list that has it."""
    entry_of = {place: entry for entry, place in reversed(list(enumerate(grads.sources)))}
    return [entry_of[place] for place in range(len(grads))]


def found_inf(grads: Gradients, p: float, exact: Tensor, peers: Peers | None) -> Tensor:
    """Whether any gradient (of any rank of the group) is NaN or inf: 1 or 0, fp32, 0-d, as torch's optimizers want it.

    `exact` is their norm in fp64, or those of scopes, [S]. That tells, except for the orders and dtypes that need a
    second read; this may come after the write pass, in which NaN and inf stay one or the other.
    """
    # Ranks may hold different dtypes, and have to agree on whether there is another all-reduce.
    if not norms.shows_nonfinite(p, grads.dtype if stays_here(grads, peers) else torch.float32):
        return found_inf_by_reading(grads, peers)
    return exact.isfinite().all().logical_not().to(torch.float32)


def found_inf_by_reading(grads: Gradients, peers: Peers | None, *, alone: bool = False) -> Tensor:
    """The same from a read pass of its own. `alone`: of this rank's gradients, without asking the others."""
    lifted = lift_each(grads, math.inf, alone=alone)
    largest = norms.whole(lifted, math.inf) if alone else total(lifted, math.inf, grads, peers)
    return found_inf(grads, math.inf, largest, None)


def scale_(grads: Gradients, coef: Tensor, *, zero: bool = False, checked: bool = False) -> None:
    """Gradients times `coef`: fp64, 0-d, or [U] for one each in the order of the batches.

    Raises ValueError if gradients with a coefficient of their own share memory, unless that has been `checked`.
    """
    if coef.dim() and not checked:
        refuse_shared(grads)

    def scale(engine: Backend, write: Write, first: int) -> Written:
        part = coef
        if coef.dim():
            part = coef[first : first + write.read_count]
            if write.places is not None:
                part = part[norms.index_on(write.places, part.device)]
        return engine.scale_(write.batch, part.to(write.batch.device), zero=zero)

    _write_all(grads, scale)


def clamp_(grads: Gradients, bound: float) -> None:
    """Every element into [-bound, bound]."""
    partial = None if grads.shards is None else grads.shards.partial()
    if partial is not None:
        raise TypeError(
            f"{grads.name(grads.sources[partial])} is a DTensor of which this rank holds one part of a sum, and the "
            "sum of clamped parts is not the clamped sum; .redistribute() it first"
        )
    _write_all(grads, lambda engine, write, first: engine.clamp_(write.batch, bound))


def _write_all(grads: Gradients, call: Callable[[Backend, Write, int], Written]) -> None:
    """To every batch, even if an interrupt arrives on the way: half of a list is never written."""
    engines = [serving(write.batch) for write in grads.writes]
    interrupted: KeyboardInterrupt | None = None
    done = 0
    while done < len(engines):
        writing = _Writing(grads, done, engines[done])
        try:
            with writing:
                writing.written = call(engines[done], writing.write, writing.first)
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
            if not writing.written:
                if done == 0:
                    break  # nothing at all has been written
                continue  # what has been begun is brought to its end
        done += 1
    if interrupted is not None:
        raise interrupted


class _Writing:
    """While an engine writes one batch. At its end, an interrupt's too, autograd knows and stand-ins are home."""

    __slots__ = ("before", "engine", "first", "grads", "write", "written")
    written: Written

    def __init__(self, grads: Gradients, number: int, engine: Backend) -> None:
        self.grads, self.write, self.engine = grads, grads.writes[number], engine
        self.first = sum(write.read_count for write in grads.writes[:number]) if number else 0  # its first place
        self.before = self.write.batch.writes

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:  # which may have come between the engine and its answer
            self.written = self._has_written(kind)
        if self.written:
            self.grads.is_written = True
            insist(self._settle)

    def _has_written(self, kind: type[BaseException]) -> bool:
        if self.engine.counts_writes:
            return self.write.batch.writes > self.before
        return not issubclass(kind, RuntimeError | TypeError | ValueError | MemoryError)  # those are the engine's own

    def _settle(self) -> None:
        tensors = self.write.batch.tensors
        twins = [twin for twin, place in self.write.twins if isinstance(self.written, bool) or self.written[place]]
        if not isinstance(self.written, bool):
            tensors = list(compress(tensors, self.written))
        increment_version(tensors + twins + self.grads.dtensors(self.write, self.first, self.written))
        self.grads.bring_home(self.write, self.first, self.written)


def insist(step: Callable[[], None]) -> None:
    """Do a step that may be done twice, even if an interrupt arrives on the way."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
    if interrupted is not None:
        raise interrupted


def spread(values: Tensor, grads: Gradients) -> Tensor:
    """[..., U] values in the order of the batches to one per entry of the list; 0 for an entry without a gradient."""
    sources = grads.packed_sources
    if sources is None:
        return values
    return norms.spread(values, norms.sent(torch.frombuffer(sources, dtype=torch.int64), values.device))


def as_result(exact: Tensor, grads: Gradients, *, finite: bool = False) -> Tensor:
    """fp64 values in the dtype of results. `finite`: as they are, if they would leave its range."""
    return rounded(exact, grads.dtype, finite=finite)


def rounded(exact: Tensor, dtype: torch.dtype, *, finite: bool = False) -> Tensor:
    """fp64 values in a dtype; subnormals, too, whatever torch does with them."""
    if exact.dtype == dtype:
        return exact
    with subnormals_count(exact.device, threads=1):
        rounded = exact.to(dtype)
    return exact if finite and not rounded.isfinite() else rounded


def _nothing() -> Tensor:
    """torch's answer for no gradients at all."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


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
