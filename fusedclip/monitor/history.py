"""All records of a run, and what they tell: percentiles, spikes, layers without gradient, a limit."""

import json
import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .record import Record, is_header, read_record

PERCENTILES = (1, 10, 50, 90, 99)
ROWS = 2048  # of layer norms at most, then every second one goes
SPIKE, BEFORE = 5.0, 50  # times the median of so many steps before
LEAST = 20  # steps, to tell anything of a limit
RECENT = 100  # steps in which a layer has to be nothing but zeros to have vanished


class Suggestion(NamedTuple):
    """A limit and why."""

    max_norm: float
    reason: str

    def __str__(self) -> str:
        return f"max_norm={self.max_norm:.3g}: {self.reason}"


@dataclass(eq=False)
class History:
    """Scalars of every record (some 250 bytes); layer norms thinned out, of at most 2,048.

    A run that goes on from an earlier step takes some steps again: the last ones count.
    """

    names: list[str]
    records: list[Record] = field(default_factory=list)  # without layers
    layer_steps: list[int] = field(default_factory=list)
    layers: list[tuple[float | None, ...]] = field(default_factory=list)
    _stride: int = 1

    def add(self, record: Record) -> None:
        if self.records and record.step <= self.records[-1].step:
            self._forget(record.step)
        if record.layers is not None and len(self.records) % self._stride == 0:
            self.layer_steps.append(record.step)
            self.layers.append(record.layers)
            if len(self.layers) > ROWS:
                del self.layers[1::2], self.layer_steps[1::2]
                self._stride *= 2
        self.records.append(replace(record, layers=None))

    def _forget(self, step: int) -> None:
        """What is known of this step and of later ones."""
        del self.records[bisect_left(self.records, step, key=lambda record: record.step) :]
        first = bisect_left(self.layer_steps, step)
        del self.layers[first:], self.layer_steps[first:]

    @classmethod
    def read(cls, path: str | Path) -> "History":
        """What a `GradMonitor` wrote to a .jsonl file, but for lines at which a run was stopped.

        Raises:
            ValueError: for a file that none wrote, or of runs with different parameters.
        """
        history: History | None = None
        broken: ValueError | None = None  # a line: the run was stopped there, if it is the last or the next one begins
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if broken is not None and not is_header(line):
                    raise broken
                broken = None
                try:
                    row = json.loads(line)
                    names = row.get("parameters")
                    record = read_record(row, len(history.names)) if history and names is None else None
                except (AttributeError, KeyError, TypeError, ValueError) as problem:
                    broken = ValueError(f"{path}, line {number}: no record of a GradMonitor ({problem!r})")
                    continue
                if names is not None:
                    history = _same_run(history, names, path, number)
                elif history and record:
                    history.add(record)
        if history is None or not history.records:
            raise broken or ValueError(
                f"{path} has no records of a GradMonitor; give its sink a path that ends in .jsonl"
            )
        return history

    def summary(self) -> "Summary":
        """Percentiles of the norm, the share of clipped steps, spikes, layers that vanished."""
        if not self.records:
            raise ValueError("nothing has been recorded yet")
        norms = sorted(record.norm for record in self.records if math.isfinite(record.norm))
        return Summary(
            steps=len(self.records),
            first=self.records[0].step,
            last=self.records[-1].step,
            percentiles={percent: quantile(norms, percent / 100) for percent in PERCENTILES} if norms else {},
            largest=norms[-1] if norms else math.nan,
            clipped=sum(record.clipped for record in self.records) / len(self.records),
            spikes=self.spikes(),
            nonfinite=[(record.step, record.nonfinite) for record in self.records if not math.isfinite(record.norm)],
            vanished=self._layers_that(lambda norm: norm == 0),
            absent=self._layers_that(lambda norm: norm is None),
        )

    def spikes(self) -> list[tuple[int, float]]:
        """Steps with a finite norm more than 5 times the median of the 50 before, and that norm."""
        recent: deque[float] = deque()
        ordered: list[float] = []
        spikes = []
        for record in self.records:
            if not math.isfinite(record.norm):
                continue
            if len(recent) >= 10 and record.norm > SPIKE * ordered[len(ordered) // 2]:
                spikes.append((record.step, record.norm))
            if len(recent) == BEFORE:
                del ordered[bisect_right(ordered, recent.popleft()) - 1]
            recent.append(record.norm)
            insort(ordered, record.norm)
        return spikes

    def suggest_max_norm(self, clip_rate: float = 0.1) -> Suggestion:
        """The limit that would have clipped so large a share of the later half of the run."""
        if not 0 < clip_rate < 1:
            raise ValueError(f"clip_rate is {clip_rate}; it must be between 0 and 1, such as 0.1 for one step of ten")
        spikes = {step for step, _ in self.spikes()}
        usual = [one.norm for one in self.records if math.isfinite(one.norm) and one.step not in spikes]
        if len(usual) < LEAST:
            raise ValueError(f"a suggestion needs {LEAST} steps with a finite norm, and there are {len(usual)}")
        late = usual[len(usual) // 2 :]
        limit = quantile(sorted(late), 1 - clip_rate)
        if limit == 0:
            raise ValueError(
                f"{late.count(0):,} of the last {len(late):,} usual steps have a norm of 0, which is no limit; look at "
                "the parameters that the summary calls vanished"
            )
        share = sum(norm > limit for norm in late) / len(late)
        reason = [
            f"it would have clipped {share:.0%} of the last {len(late)} usual steps of {len(self.records)}, whose "
            f"median norm is {quantile(sorted(late), 0.5):.3g}"
        ]
        if spikes:
            those = "1 spike was" if len(spikes) == 1 else f"{len(spikes)} spikes were"
            reason.append(f"{those} left out, and would have been clipped")
        reason.append(_trend(late))
        reason.append(_now(self.records[-len(late) :]))
        return Suggestion(limit, "; ".join(filter(None, reason)))

    def _layers_that(self, is_so: Callable[[float | None], bool]) -> list[str]:
        rows = self.layers[-RECENT:]
        return [name for i, name in enumerate(self.names) if rows and all(is_so(row[i]) for row in rows)]


@dataclass(frozen=True)
class Summary:
    """What `summary` found; as text, a line for each."""

    steps: int
    first: int
    last: int
    percentiles: dict[int, float]
    largest: float  # finite norm
    clipped: float  # share of steps
    spikes: list[tuple[int, float]]
    nonfinite: list[tuple[int, tuple[str, ...]]]
    vanished: list[str]  # parameters with zeros alone in the last 100 recorded steps
    absent: list[str]  # and those without any gradient there

    def __str__(self) -> str:
        percentiles = "   ".join(f"p{percent} {value:.3g}" for percent, value in self.percentiles.items())
        spikes = [f"step {step}: {norm:.3g}" for step, norm in self.spikes]
        broken = [f"step {step}: {few(names, 'parameter')}" for step, names in self.nonfinite]
        lines = {
            "steps": f"{self.steps:,} recorded, {self.first} to {self.last}",
            "norm": f"{percentiles}   largest {self.largest:.3g}",
            "clipped": f"{self.clipped:.1%} of the steps",
            "spikes": few(spikes, "spike", 5) if spikes else f"none above {SPIKE:g} times the median of {BEFORE} steps",
            "not finite": few(broken, "step", 3) if broken else "none",
            "vanished": few(self.vanished, "parameter") if self.vanished else "none",
        }
        if self.absent:
            lines["no gradient"] = few(self.absent, "parameter")
        return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def few(names: Sequence[str], noun: str, most: int = 6) -> str:
    """The first of them, and how many more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more {noun}{'s' * (more > 1)}" if more > 0 else "")


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """By linear interpolation, as numpy's."""
    position = (len(ordered) - 1) * fraction
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _same_run(history: History | None, names: list[str], path: str | Path, number: int) -> History:
    if history is not None and history.names != names:
        raise ValueError(f"{path}, line {number}: a run with other parameters begins here; keep each in its own file")
    return history or History(names)


def _trend(late: Sequence[float]) -> str:
    """Whether norms still fall or rise, so that a constant limit will not do for long."""
    quarter = len(late) // 2
    before, after = (quantile(sorted(part), 0.5) for part in (late[:quarter], late[quarter:]))
    if before > 0 and abs(after / before - 1) > 0.25:
        return (
            f"but the median went from {before:.3g} to {after:.3g} within these steps, so ask again later, or take a "
            "rule that follows (fusedclip.adaptive)"
        )
    return ""


def _now(records: Iterable[Record]) -> str:
    listed = list(records)
    limits = {record.limit for record in listed}
    share = sum(record.clipped for record in listed) / len(listed)
    if len(limits) != 1 or None in limits:
        return f"the limits of these steps clipped {share:.0%}"
    (limit,) = limits
    return "" if limit == math.inf else f"the present limit, {limit:.3g}, clipped {share:.0%}"
