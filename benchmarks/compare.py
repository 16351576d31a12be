"""Two reports row by row: what became faster or slower beyond the noise of its own samples."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Measurement, Report, Row
from benchmarks.table import duration, label, markdown, short

# Medians of two runs of the same code differ by up to about this much on a shared machine.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Change:
    """One contender of one row in both reports; times are multiplied by `ratio` from the first to the second."""

    row: Row
    before: Measurement
    after: Measurement
    ratio: float
    floor: float
    """The same for the row's read floor."""
    foreach: float
    """The same for torch's foreach path."""

    @property
    def verdict(self) -> str:
        if not separated(self.before, self.after):
            return "within noise"
        # A slower memory shows in the floor, a slower processor in torch's time; what moved between the two followed.
        slow, fast = max(1.0, self.floor, self.foreach), min(1.0, self.floor, self.foreach)
        if fast * (1 - TOLERANCE) <= self.ratio <= slow * (1 + TOLERANCE):
            return "moved with the machine"
        return "faster" if self.ratio < fast else "slower"


def separated(one: Measurement, other: Measurement) -> bool:
    """True if the p20..p80 ranges lie apart and the medians differ by more than the tolerance."""
    if None in (one.p20_us, one.p50_us, one.p80_us, other.p20_us, other.p50_us, other.p80_us):
        return False
    (low, middle, high), (other_low, other_middle, other_high) = _range(one), _range(other)
    return (high < other_low or other_high < low) and abs(other_middle / middle - 1) > TOLERANCE


def _range(one: Measurement) -> tuple[float, float, float]:
    return one.p20_us or 0.0, one.p50_us or 0.0, one.p80_us or 0.0


def changes(first: Report, second: Report) -> list[Change]:
    """All pairs that were timed in both reports."""
    rows = {row.key: row for row in first.rows}
    found = []
    for row in second.rows:
        old_row = rows.get(row.key)
        for after in row.contenders if old_row else []:
            before = old_row.find(after.contender) if old_row else None
            if old_row and before and before.p50_us and after.p50_us:
                floor = (row.floor.p20_us or 1.0) / (old_row.floor.p20_us or 1.0)  # medians are disturbed more easily
                torch_ = row.find(TORCH_FOREACH) if after.contender != TORCH_FOREACH else None
                foreach = growth(old_row.find(TORCH_FOREACH), torch_)
                found.append(Change(row, before, after, growth(before, after), floor, foreach))
    return found


def growth(old: Measurement | None, new: Measurement | None) -> float:
    if not old or not new or not old.p50_us or not new.p50_us:
        return 1.0
    return new.p50_us / old.p50_us


def only_in_one(first: Report, second: Report) -> list[str]:
    """Rows that have nothing to be compared with."""
    keys = {row.key for row in first.rows} ^ {row.key for row in second.rows}
    return [label(row) for row in [*first.rows, *second.rows] if row.key in keys]


def outcome_changed(first: Report, second: Report) -> list[str]:
    """Contenders that the oracle passed in one report and failed in the other."""
    rows = {row.key: row for row in first.rows}
    return [
        f"{label(row)}, {after.contender}: {before.failure or 'passed'} -> {after.failure or 'passed'}"
        for row in second.rows
        if row.key in rows
        for after in row.contenders
        if (before := rows[row.key].find(after.contender)) and bool(before.failure) != bool(after.failure)
    ]


def compare(first: Report, second: Report) -> str:
    header = ["gradients / contender", "before", "after", "after / before", "floor", "torch foreach", "verdict"]
    lines, last = [], None
    for change in changes(first, second):
        if change.row is not last:
            lines.append([f"**{label(change.row)}**", *[""] * 6])
            last = change.row
        lines.append(
            [
                change.after.contender,
                duration(change.before.p50_us),
                duration(change.after.p50_us),
                short(change.ratio, ".2f"),
                short(change.floor, ".2f"),
                short(change.foreach, ".2f"),
                change.verdict,
            ]
        )
    missing = only_in_one(first, second)
    notes = [f"Only in one of the two: {', '.join(missing)}."] if missing else []
    notes += outcome_changed(first, second)
    return "\n".join([markdown(header, lines), "", *notes, _other_environment(first, second)]).strip()


def _other_environment(first: Report, second: Report) -> str:
    differing = [
        f"{key}: {first.environment.get(key)} -> {second.environment.get(key)}"
        for key in ("device", "threads", "versions", "commit")
        if first.environment.get(key) != second.environment.get(key)
    ]
    return "Differs besides: " + "; ".join(differing) if differing else "Same device, threads, versions and commit."
