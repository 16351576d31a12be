"""Two reports row by row: what became faster or slower beyond the noise of its own samples."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Measurement, Report, Row
from benchmarks.table import duration, label, markdown

# Medians of two runs of the same code differ by up to about this much on a shared machine.
TOLERANCE = 0.1
SAME = ("device", "threads", "versions", "commit")


@dataclass(frozen=True)
class Change:
    """One contender of one row in both reports; times are multiplied by `ratio` from the first to the second.

    `floor` is the same for the row's read floor, `foreach` for torch's foreach path.
    """

    row: Row
    before: Measurement
    after: Measurement
    ratio: float
    floor: float
    foreach: float

    @property
    def verdict(self) -> str:
        one, other = self.before, self.after
        apart = (one.p80_us or 0) < (other.p20_us or 0) or (other.p80_us or 0) < (one.p20_us or 0)
        if not apart or abs(self.ratio - 1) <= TOLERANCE:
            return "within noise"
        # A slower memory shows in the floor, a slower processor in torch's time; what moved between the two followed.
        slow, fast = max(1.0, self.floor, self.foreach), min(1.0, self.floor, self.foreach)
        if fast * (1 - TOLERANCE) <= self.ratio <= slow * (1 + TOLERANCE):
            return "moved with the machine"
        return "faster" if self.ratio < fast else "slower"


def changes(first: Report, second: Report) -> Iterator[Change]:
    """All pairs that were timed in both reports."""
    for old, new, before, after in in_both(first, second):
        if before.p50_us and after.p50_us:
            floor = (new.floor.p20_us or 1.0) / (old.floor.p20_us or 1.0)  # medians are disturbed more easily
            itself = after.contender == TORCH_FOREACH
            foreach = 1.0 if itself else growth(old.find(TORCH_FOREACH), new.find(TORCH_FOREACH))
            yield Change(new, before, after, growth(before, after), floor, foreach)


def growth(old: Measurement | None, new: Measurement | None) -> float:
    return new.p50_us / old.p50_us if old and new and old.p50_us and new.p50_us else 1.0


def in_both(first: Report, second: Report) -> Iterator[tuple[Row, Row, Measurement, Measurement]]:
    rows = {row.key: row for row in first.rows}
    for new in second.rows:
        for after in new.contenders:
            if (old := rows.get(new.key)) and (before := old.find(after.contender)):
                yield old, new, before, after


def compare(first: Report, second: Report) -> str:
    header = ["gradients, contender", "before", "after", "after / before", "floor", "torch foreach", "verdict"]
    lines = []
    for one in changes(first, second):
        times = [duration(time.p50_us) for time in (one.before, one.after)]
        ratios = [f"{ratio:.2f}" for ratio in (one.ratio, one.floor, one.foreach)]
        lines.append([f"{label(one.row)}, {one.after.contender}", *times, *ratios, one.verdict])
    return "\n".join([markdown(header, lines), "", *notes(first, second)]).strip()


def notes(first: Report, second: Report) -> Iterator[str]:
    """Rows that have nothing to be compared with, contenders whose answers became right or wrong, the environment."""
    keys = {row.key for row in first.rows} ^ {row.key for row in second.rows}
    if missing := [label(row) for row in [*first.rows, *second.rows] if row.key in keys]:
        yield f"Only in one of the two: {', '.join(missing)}."
    for _, new, before, after in in_both(first, second):
        if bool(before.failure) != bool(after.failure):
            outcomes = f"{before.failure or 'passed'} -> {after.failure or 'passed'}"
            yield f"{label(new)}, {after.contender}: {outcomes}"
    one, other = first.environment, second.environment
    differing = [f"{key}: {one.get(key)} -> {other.get(key)}" for key in SAME if one.get(key) != other.get(key)]
    yield "Differs besides: " + "; ".join(differing) if differing else f"Same {', '.join(SAME)}."
