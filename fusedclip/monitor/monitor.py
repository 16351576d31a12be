"""Clipping that keeps a diary."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .. import passes, reading
from ..arguments import Limit, check_norm_type, on_nonfinite_is, shown
from ..gradients import Gradients, gather_given
from ..later import Later
from ..norms import MODULUS, Clipped, ClipRule, EachRule, Rule
from ..peers import Elsewhere, Group, check_group
from ..rules import AdaptiveRule, as_rule, renamed
from ..torch_internals import outside_graphs, refuse_tracing
from ..transfers import on_device
from .history import History, Suggestion, Summary
from .measure import Found, measure_each
from .record import Record
from .sinks import Sink, as_sink

_SCALARS = 5  # at the head of a row: norm, limit, smallest coefficient, zeros, largest magnitude


class _Note(NamedTuple):
    """What the host knows of a step at once."""

    step: int
    has_limit: bool
    absent: frozenset[int]  # entries without a gradient


class GradMonitor:
    """Clips, and records what it sees: norms of all and of each parameter, coefficient, zeros, the largest element::

        monitor = GradMonitor(model.named_parameters(), sinks=["run.jsonl"])
        for batch in data:
            loss(batch).backward()
            monitor.clip_grad_norm_(1.0)
            optimizer.step()
        print(monitor.summary(), monitor.suggest_max_norm(), sep="\\n")
        monitor.plot("run.png")

    The numbers of a step lie in a ring buffer on the device and are copied to the host beside what it does next; sinks
    get them when they have arrived, at a later call. Nothing waits for the device but `flush`. A pickled or copied
    monitor has the records so far and no sinks.

    Args:
        named_parameters: as `model.named_parameters()` gives them, or a dict. Records call parameters by these names.
        sinks: where records go: a path that ends in .jsonl (added to), a `torch.utils.tensorboard.SummaryWriter`, a
            Weights & Biases run, a `logging.Logger`, or any function of a `Record`; one, or several. Of ranks with
            sharded gradients each has the same records: give the sinks to one. With `group=` only the norm is the same.
        every: record each so many steps; the others are only clipped.
        per_layer: keep the norm of every parameter (32 bytes each; of 2,048 steps at most, evenly thinned out). Each
            record takes some 250 bytes beside.

    Raises:
        TypeError, ValueError, FileNotFoundError: for names that are none or twice there, a sink that is none, or whose
            directory does not exist.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        sinks: Any = (),
        every: int = 1,
        per_layer: bool = True,
    ) -> None:
        self._names, self._parameters = _named(named_parameters)
        self._sizes = [parameter.numel() for parameter in self._parameters]
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, at least 1, got {shown(every)}")
        listed = list(sinks) if isinstance(sinks, list | tuple | set) else [sinks]
        self._sinks: list[Sink] = [as_sink(sink, self._names, self._sizes) for sink in listed]
        self._every, self._per_layer = every, per_layer
        self._later = Later()
        self.history = History(self._names)
        self.step = 0
        """The number of the next step."""

    @outside_graphs
    def clip_grad_norm_(
        self,
        max_norm: Limit | AdaptiveRule = math.inf,
        norm_type: SupportsFloat | str = 2.0,
        *,
        on_nonfinite: Literal["propagate", "zero"] = "propagate",
        group: Group | None = None,
        counted_elsewhere: Elsewhere | None = None,
    ) -> Tensor:
        """`fusedclip.clip_grad_norm_` of the monitored parameters, recorded. `max_norm` may be an adaptive rule, but
        none that leaves steps out.

        Returns:
            The norm before clipping: 0-d, fp32 (fp64 if any gradient is), on the first gradient's device. Does not wait
            for the device.

        Raises:
            TypeError, ValueError, RuntimeError: as `fusedclip.clip_grad_norm_`. And what a sink raises at an earlier
                step's record, which later sinks then miss. The gradients are as they were.
        """
        refuse_tracing()
        p, rule = check_norm_type(norm_type), as_rule(max_norm)
        if on_nonfinite_is("zero", on_nonfinite):
            rule = _with_zeros(rule)
        peers = check_group(group, counted_elsewhere)
        if isinstance(rule, AdaptiveRule):
            if rule.skips:
                raise ValueError(
                    f"{type(rule).__name__} leaves steps out, which a monitor cannot; give it to "
                    "fusedclip.optim.clip_on_step, and leave max_norm at inf here"
                )
            rule.bind(self._parameters, self._names)
        grads = gather_given(self._parameters, "grad", p=MODULUS if self._is_recorded else p, peers=peers)
        self._deliver()
        if self._is_recorded:
            norm = self._clip_and_record(grads, p, rule)
        else:
            norm = passes.clip_(grads, p, rule, dtype=torch.float64).norm
        if isinstance(rule, AdaptiveRule):
            rule.settle()
        self.step += 1
        return reading.as_result(norm, grads)

    def flush(self) -> None:
        """Wait for what is on its way, hand it to the sinks, and have them write it out."""
        self._deliver(wait=True)
        for sink in self._sinks:
            getattr(sink, "flush", lambda: None)()

    def close(self) -> None:
        """`flush`, and close the files that this has opened, even if a sink raises."""
        try:
            self.flush()
        finally:
            for sink in self._sinks:
                getattr(sink, "close", lambda: None)()

    def __enter__(self) -> "GradMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def summary(self) -> Summary:
        """Percentiles of the norm, share of clipped steps, spikes, layers that vanished: of all recorded so far."""
        self._deliver(wait=True)
        return self.history.summary()

    def suggest_max_norm(self, clip_rate: float = 0.1) -> Suggestion:
        """The limit that would have clipped so large a share of the later half of the run, and the reasons for it.

        Raises:
            ValueError: before 20 steps with a finite norm, or for a rate that is not between 0 and 1.
        """
        self._deliver(wait=True)
        return self.history.suggest_max_norm(clip_rate)

    def plot(self, path: str | Path) -> None:
        """A picture of the run: its norm with the limit, their distribution, each layer. Needs matplotlib."""
        from .picture import draw

        self._deliver(wait=True)
        draw(self.history, path)

    def state_dict(self) -> dict[str, Any]:
        """The number of the step and the parameters' names. What was recorded is in the sinks."""
        return {"step": self.step, "names": list(self._names)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with the number of the step.

        Raises:
            ValueError: if the parameters have other names now, or another order.
        """
        if not isinstance(saved, Mapping) or not {"step", "names"} <= set(saved):
            raise ValueError("GradMonitor.load_state_dict takes what its state_dict returned")
        if list(saved["names"]) != self._names:
            raise ValueError(f"this was saved for other parameters: {renamed(saved['names'], self._names)}")
        self.step = saved["step"]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what has been recorded, and no sinks, into which two would write."""
        self._deliver(wait=True)
        return {**self.__dict__, "_sinks": []}

    @property
    def _is_recorded(self) -> bool:
        return self.step % self._every == 0

    def _clip_and_record(self, grads: Gradients, p: float, rule: Rule) -> Tensor:
        found = measure_each(grads, p)
        clipped = passes.clipped_by(found.lifted, grads, p, rule)
        passes.scale_(grads, clipped.coef, zero=rule.zero_nonfinite)
        self._send(clipped, found, grads, rule)
        return clipped.norm

    def _send(self, clipped: Clipped, found: Found, grads: Gradients, rule: Rule) -> None:
        norm, device = clipped.norm, clipped.norm.device
        absent: frozenset[int] = frozenset()
        if grads.packed_sources is not None:
            absent = frozenset(entry for entry, parameter in enumerate(self._parameters) if parameter.grad is None)
        limit = _limit(rule)
        head = torch.stack([
            norm,
            on_device(math.nan if limit is None else limit, device),
            clipped.coef.amin() if clipped.coef.numel() else torch.ones_like(norm),
            found.zeros,
            found.largest,
        ])  # fmt: skip
        self._later.send(torch.cat([head, found.norm, found.nonfinite]), _Note(self.step, limit is not None, absent))

    def _deliver(self, *, wait: bool = False) -> None:
        for note, row in self._later.arrived(wait=wait):
            record = self._record(note, row)
            self.history.add(record)
            for sink in self._sinks:
                sink(record)

    def _record(self, note: _Note, row: list[float]) -> Record:
        norm, limit, coef, zeros, largest = row[:_SCALARS]  # zeros of replicas are counted in parts
        each, broken = row[_SCALARS : _SCALARS + len(self._names)], row[_SCALARS + len(self._names) :]
        nonfinite = tuple(name for name, count in zip(self._names, broken, strict=True) if count)
        layers = tuple(None if i in note.absent else own for i, own in enumerate(each)) if self._per_layer else None
        known = limit if note.has_limit else None
        return Record(note.step, norm, known, coef, round(zeros), largest, nonfinite, layers)


def _named(named: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    pairs = list(named.items() if isinstance(named, Mapping) else named)
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                f"named_parameters must be names with parameters, as model.named_parameters() gives, got {shown(pair)}"
            )
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"two parameters are called {min(twice)!r}")
    if not pairs:
        raise ValueError("there is no parameter to monitor; an iterator may have been used up before")
    return names, [parameter for _, parameter in pairs]


def _with_zeros(rule: Rule) -> Rule:
    if not isinstance(rule, ClipRule):
        raise ValueError(f"on_nonfinite='zero' is for a constant max_norm; {type(rule).__name__} has no such option")
    return rule._replace(zero_nonfinite=True)


def _limit(rule: Rule) -> float | Tensor | None:
    """What the norm of all gradients was held to."""
    if isinstance(rule, ClipRule):
        return rule.max_norm
    if isinstance(rule, AdaptiveRule) and not isinstance(rule, EachRule):
        return rule.proposed_threshold()
    return None
