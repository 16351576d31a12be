"""Two reports row by row: what became faster or slower beyond the noise of its own samples."""

from collections.abc import Iterator
from math import isnan

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Measurement, Report, Row
from benchmarks.table import duration, label, markdown

# Medians of two runs of the same code differ by up to about this much on a shared machine.
TOLERANCE = 0.1
SAME = ("device", "threads", "versions", "commit")


def compare(first: Report, second: Report) -> str:
    header = ["gradients, contender", "before", "after", "after / before", "floor", "torch foreach", "verdict"]
    lines = [line(*pair) for pair in in_both(first, second) if not isnan(growth(*pair[2:]))]
    return "\n".join([markdown(header, lines), "", *notes(first, second)])


def line(old: Row, new: Row, before: Measurement, after: Measurement) -> list[str]:
    """One contender of one row in both reports, beside what became of the row's floor and of torch's foreach path."""
    foreach = growth(old.find(TORCH_FOREACH), new.find(TORCH_FOREACH))
    if after.contender == TORCH_FOREACH or isnan(foreach):
        foreach = 1.0
    # Of the floor the p20: medians are disturbed more easily.
    ratios = growth(before, after), new.floor.p20_us / old.floor.p20_us, foreach
    said = *(duration(one.p50_us) for one in (before, after)), *(f"{ratio:.2f}" for ratio in ratios)
    return [f"{label(new)}, {after.contender}", *said, verdict(before, after, *ratios)]


def verdict(before: Measurement, after: Measurement, ratio: float, floor: float, foreach: float) -> str:
    apart = before.p80_us < after.p20_us or after.p80_us < before.p20_us
    if not apart or abs(ratio - 1) <= TOLERANCE:
        return "within noise"
    # A slower memory shows in the floor, a slower processor in torch's time; what moved between the two followed.
    slow, fast = max(1.0, floor, foreach), min(1.0, floor, foreach)
    if fast * (1 - TOLERANCE) <= ratio <= slow * (1 + TOLERANCE):
        return "moved with the machine"
    return "faster" if ratio < fast else "slower"


def growth(before: Measurement, after: Measurement) -> float:
    return after.p50_us / before.p50_us


def in_both(first: Report, second: Report) -> Iterator[tuple[Row, Row, Measurement, Measurement]]:
    rows = {row.key: row for row in first.rows}
    for new in second.rows:
        if old := rows.get(new.key):
            names = {one.contender for one in old.contenders}
            yield from ((old, new, old.find(one.contender), one) for one in new.contenders if one.contender in names)


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
