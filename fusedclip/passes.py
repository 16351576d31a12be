"""The one door to the engines: gradients are measured, a rule makes a coefficient of that, the gradients are scaled.

clip_list_       all of it for a list, in one call of the extension where nothing stands between the two passes
scale_list_      the write pass for a list whose norm is known, in one call as well
clip_            all of it for gradients that have been gathered
measure, norm    all of it but the write pass; reading.py: the read pass by itself
scale_, clamp_   the write pass

Everything is checked before the first write. Autograd is told of what was written, and stand-ins of gradients are
brought home, here alone, and also when an interrupt arrives while an engine writes.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import compress

import torch
from torch import Tensor

from . import backends, norms
from .arguments import explain_no_gradients
from .backends import Backend, Written, serving
from .gradients import Gradients, Write, from_sweep, gather, refuse_shared
from .interrupts import all_or_none, insist
from .norms import Clipped, ClipRule, EachRule, Rule
from .peers import Peers
from .reading import first_entries, lift_each, norms_of_entries, raise_if_nonfinite, rounded, total
from .torch_internals import as_torch, increment_version
from .transfers import index_on, on_device


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
        grads = gather(items, attribute, p=p, peers=peers)
    if attribute is None:
        return handed_out(norm(grads, p, error_if_nonfinite=error_if_nonfinite), grads)
    if not grads.reads:
        explain_no_gradients(items, attribute)
    return handed_out(clip_(grads, p, rule, error_if_nonfinite=error_if_nonfinite).norm, grads)


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
    scale_(grads, rule(on_device(norm, grads.device)), zero=rule.zero_nonfinite)


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
    multiplier: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Clipped:
    """Clip to the rule; the norm is in `dtype`, that of results unless given.

    `multiplier` (0-d, on any device): the gradients are multiplied by it as well, in the same write pass; norm and rule
    are those of the product.
    """
    engine = _fusing(grads, p, error_if_nonfinite)
    if engine is None or not isinstance(rule, ClipRule) or grads.writes[0].places is not None:
        exact, coef = measure(grads, p, rule, error_if_nonfinite=error_if_nonfinite, multiplier=multiplier)
        scale_(grads, coef, zero=rule.zero_nonfinite)
        return Clipped(rounded(exact, dtype or grads.dtype, finite=error_if_nonfinite), coef)
    there = None if multiplier is None else multiplier.to(grads.device)
    lifted = None if grads.is_local else total(lift_each(grads, p), p, grads)
    writing = _Writing(grads, 0, engine)
    try:
        clipped, writing.written = engine.clip_(
            writing.write.batch, p, rule, dtype or grads.dtype, multiplier=there, lifted=lifted
        )
        writing.settle()
    except BaseException as error:
        writing.settle_after(error)
        raise
    return clipped


def _fusing(grads: Gradients, p: float, error_if_nonfinite: bool) -> Backend | None:
    """The engine that can do all of it at once, or all but the read pass, if there is one."""
    if error_if_nonfinite or len(grads.reads) != 1:
        return None
    engine = serving(grads.reads[0])
    return engine if engine.fuses(p) else None


def measure(
    grads: Gradients, p: float, rule: Rule, *, error_if_nonfinite: bool = False, multiplier: Tensor | None = None
) -> Clipped:
    """What `clip_` does but for the write pass: the coefficient is for someone else to apply. The norm is in fp64."""
    if not grads.reads and grads.is_local:
        return Clipped(norm(grads, p, torch.float64), torch.ones((), dtype=torch.float64, device="cpu"))
    if isinstance(rule, EachRule):
        return clipped_by(lift_each(grads, p), grads, p, rule, multiplier, error_if_nonfinite)
    exact = norm(grads, p, torch.float64, error_if_nonfinite=error_if_nonfinite)
    return norms.clipped(exact, p, rule, multiplier)


def clipped_by(
    lifted: Tensor, grads: Gradients, p: float, rule: Rule, multiplier: Tensor | None = None, only_finite: bool = False
) -> Clipped:
    """The same of gradients that have been read."""
    exact = _exact_norm(lifted, grads, p, only_finite)
    if not isinstance(rule, EachRule):
        return norms.clipped(exact, p, rule, multiplier)
    clipped = norms.clipped(exact, p, rule, multiplier, norms_of_entries(lifted, grads, p))
    if grads.packed_sources is None:
        return clipped
    return Clipped(clipped.norm, clipped.coef[index_on(first_entries(grads), clipped.coef.device)])


def norm(grads: Gradients, p: float, dtype: torch.dtype | None = None, *, error_if_nonfinite: bool = False) -> Tensor:
    """The norm of all gradients, in `dtype`, that of results unless given. Waits only if `error_if_nonfinite`."""
    if not grads.reads and grads.is_local:
        return torch.zeros((), dtype=dtype or torch.float32, device="cpu")  # torch's answer for none
    engine = _fusing(grads, p, error_if_nonfinite) if grads.is_local else None
    if engine is not None:
        return engine.norm(grads.reads[0], p, dtype or grads.dtype)
    exact = _exact_norm(lift_each(grads, p), grads, p, error_if_nonfinite)
    return rounded(exact, dtype or grads.dtype, finite=error_if_nonfinite)


def _exact_norm(lifted: Tensor, grads: Gradients, p: float, error_if_nonfinite: bool) -> Tensor:
    exact = norms.finish(total(lifted, p, grads), p)
    if error_if_nonfinite:
        raise_if_nonfinite(exact, lifted, grads, p)
    return exact


def found_inf(grads: Gradients, p: float, exact: Tensor) -> Tensor:
    """Whether any gradient (of any rank of the group) is NaN or inf: 1 or 0, fp32, 0-d, as torch's optimizers want it.

    `exact` is their norm in fp64, or those of scopes, [S]. That tells, except for the orders and dtypes that need a
    second read; this may come after the write pass, in which NaN and inf stay one or the other.
    """
    # Ranks may hold different dtypes, and have to agree on whether there is another all-reduce.
    if not norms.shows_nonfinite(p, grads.dtype if grads.is_local else torch.float32):
        return found_inf_by_reading(grads)
    return exact.isfinite().all().logical_not().to(torch.float32)


def found_inf_by_reading(grads: Gradients, *, alone: bool = False) -> Tensor:
    """The same from a read pass of its own. `alone`: of this rank's gradients, without asking the others."""
    lifted = lift_each(grads, math.inf, alone=alone)
    largest = norms.whole(lifted, math.inf) if alone else total(lifted, math.inf, grads)
    return found_inf(grads, math.inf, largest)


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
                part = part[index_on(write.places, part.device)]
        return engine.scale_(write.batch, part.to(write.batch.device), zero=zero)

    _write_all(grads, scale)


def clamp_(grads: Gradients, bound: float) -> None:
    """Every element into [-bound, bound]."""
    entry = None if grads.shards is None else grads.shards.partial()
    if entry is not None:
        raise TypeError(
            f"{grads.name(grads.sources[entry])} is a DTensor of which this rank holds one part of a sum, and the "
            "sum of clamped parts is not the clamped sum; .redistribute() it first"
        )
    _write_all(grads, lambda engine, write, first: engine.clamp_(write.batch, bound))


def _write_all(grads: Gradients, call: Callable[[Backend, Write, int], Written]) -> None:
    """To every batch, even if an interrupt arrives on the way: half of a list is never written."""
    writings = [_Writing(grads, number, serving(write.batch)) for number, write in enumerate(grads.writes)]
    all_or_none([(partial(writing.run, call), writing.has_written) for writing in writings])


class _Writing:
    """An engine writes one batch, and what follows at all events: autograd knows, and stand-ins are home."""

    __slots__ = ("before", "engine", "first", "grads", "write", "written")
    written: Written

    def __init__(self, grads: Gradients, number: int, engine: Backend) -> None:
        self.grads, self.write, self.engine = grads, grads.writes[number], engine
        self.first = sum(write.read_count for write in grads.writes[:number]) if number else 0  # its first place
        self.before, self.written = self.write.batch.writes, False

    def run(self, call: Callable[[Backend, Write, int], Written]) -> None:
        try:  # around both, as an interrupt may come between them
            self.written = call(self.engine, self.write, self.first)
            self.settle()
        except BaseException as error:
            self.settle_after(error)
            raise

    def has_written(self) -> bool:
        return bool(self.written)

    def settle(self) -> None:
        """May be done twice."""
        if not self.written:
            return
        self.grads.is_written = True
        tensors = self.write.batch.tensors
        twins = [twin for twin, place in self.write.twins if isinstance(self.written, bool) or self.written[place]]
        if not isinstance(self.written, bool):
            tensors = list(compress(tensors, self.written))
        increment_version(tensors + twins + self.grads.dtensors(self.write, self.first, self.written))
        self.grads.bring_home(self.write, self.first, self.written)

    def settle_after(self, error: BaseException) -> None:
        """What was cut off by an interrupt or an error of the engine's; an error while settling is no such."""
        if self.written and not isinstance(error, KeyboardInterrupt):
            return
        self.written = self.written or self._wrote_before(type(error))
        insist(self.settle)

    def _wrote_before(self, kind: type[BaseException]) -> bool:
        if self.engine.counts_writes:
            return self.write.batch.writes > self.before
        return not issubclass(kind, RuntimeError | TypeError | ValueError | MemoryError)  # those are the engine's own
