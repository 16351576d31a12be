"""The project's promises on a GPU, from the rows, steps and ceilings of one report.

Times are the device's own, the host running ahead, except where a promise says wall time or host time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from benchmarks.claims import HOST_US, HOST_US_PER_TENSOR
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.operations import Operation
from benchmarks.optimizer_step import CHOOSES, DEFERS, DROP_IN, SCALES, TORCH, UNSCALE_OURS, UNSCALE_TORCH
from benchmarks.results import Claim, Measurement, Report, Row

LARGE = 10**9  # bytes
LARGE_DTYPES = ("float32", "bfloat16")
READ_FRACTION = {"fusedclip cuda": 0.93, "fusedclip triton": 0.88}
NOT_CLIPPED, CLIPPED, CLIPPED_FRACTION = 2.8, 1.05, 0.90  # times torch foreach, twice; of the ceilings
SMALL_LIST, MANY_TENSORS = 2.0, 10.0  # times torch foreach, wall time
UNSCALE, STEP = 1.6, 1.16
# (workload, dtype, operation) -> milliseconds of wall time, and what others have published for an H100:
# NVIDIA-NeMo/Automodel pull request 3685, TransformerEngine's kernels / its own Triton ones.
PUBLISHED = {
    ("500x450000", "mixed", Operation.CLIPPED): (1.2, "published: TransformerEngine 3.93 ms, NeMo Automodel 3.73 ms"),
    ("one-1.536e9", "bfloat16", Operation.CLIPPED): (3.6, "published: TransformerEngine 7.89 ms, NeMo Automodel 7.32"),
    ("one-1.536e9", "bfloat16", Operation.NOT_CLIPPED): (1.2, "published, clipped or not: 7.89 ms and 7.32 ms"),
}


def claims(report: Report) -> list[Claim]:
    """Every claim for which the report has a measurement; of several rows the worst counts, and is named."""
    rows, ceilings = report.rows, report.gpu.get("ceilings")
    found = [
        *ceiling_claims(rows, ceilings),
        large_claim(rows, Operation.NOT_CLIPPED, NOT_CLIPPED),
        large_claim(rows, Operation.CLIPPED, CLIPPED),
        small_lists_claim(rows),
        many_tensors_claim(rows),
        host_claim(rows),
    ]
    return [*filter(None, found), *published_claims(rows), *step_claims(report.steps)]


Value = Callable[[Row, Measurement], float]


def worst(
    name: str, rows: Iterable[Row], engine: str, value: Value, bar: float, unit: str, *, more_is_better: bool = True
) -> Claim | None:
    """The claim for the row where it holds least; a wrong answer counts as the worst there is."""
    values = []
    for row in rows:
        one = row.find(engine)
        if one is not None and one.failure:
            values.append((0.0 if more_is_better else float("inf"), f"{row.title}, {row.dtype}: {one.failure}"))
        elif one is not None and one.device_us:
            values.append((value(row, one), f"{row.title}, {row.dtype}, {row.operation}"))
    if not values:
        return None
    least, note = (min if more_is_better else max)(values)
    return Claim(name, least, bar, unit, more_is_better, f"worst of {len(values)}: {note}")


def is_large(row: Row, operation: Operation) -> bool:
    return row.bytes >= LARGE and row.dtype in LARGE_DTYPES and row.operation == operation.value


def read_us(row: Row, ceilings: dict[str, Any]) -> float:
    """At the read ceiling; a plain sum timed among the row's own calls may have been faster still."""
    at_ceiling = row.bytes / float(ceilings["read"]) / 1e3
    return min(at_ceiling, row.floor.device_us or at_ceiling)


def device_ratio(row: Row, ours: Measurement) -> float:
    return _over(row.find(TORCH_FOREACH), "device_us", ours)


def wall_ratio(row: Row, ours: Measurement) -> float:
    return _over(row.find(TORCH_FOREACH), "p50_us", ours)


def _over(foreach: Measurement | None, time: str, ours: Measurement) -> float:
    """0 where torch was not timed: nothing is claimed against nobody."""
    theirs, own = getattr(foreach, time, None), getattr(ours, time)
    return float(theirs / own) if theirs and own else 0.0


OURS = "fusedclip cuda"


def ceiling_claims(rows: list[Row], ceilings: dict[str, Any] | None) -> Iterator[Claim | None]:
    if ceilings is None:
        return
    for engine, dtype in product(READ_FRACTION, LARGE_DTYPES):
        yield read_claim(rows, engine, dtype, ceilings)
    yield clipped_claim(rows, ceilings)


def read_claim(rows: list[Row], engine: str, dtype: str, ceilings: dict[str, Any]) -> Claim | None:
    def fraction(row: Row, one: Measurement) -> float:
        return read_us(row, ceilings) / (one.device_us or float("inf"))

    large = [row for row in rows if is_large(row, Operation.NORM) and row.dtype == dtype]
    name = f"norm pass, >= 1 GB, {dtype}, {engine}"
    return worst(name, large, engine, fraction, READ_FRACTION[engine], "of the read ceiling")


def large_claim(rows: list[Row], operation: Operation, bar: float) -> Claim | None:
    large = [row for row in rows if is_large(row, operation)]
    return worst(f"{operation.value}, >= 1 GB, torch foreach / {OURS}", large, OURS, device_ratio, bar, "x")


def clipped_claim(rows: list[Row], ceilings: dict[str, Any]) -> Claim | None:
    def fraction(row: Row, one: Measurement) -> float:
        ideal = read_us(row, ceilings) + 2 * row.bytes / float(ceilings["copy"]) / 1e3
        return ideal / (one.device_us or float("inf"))

    large = [row for row in rows if is_large(row, Operation.CLIPPED)]
    name = f"clipped, >= 1 GB, {OURS}, (N / read ceiling + 2 N / copy ceiling) / time"
    return worst(name, large, OURS, fraction, CLIPPED_FRACTION, "of the ceilings")


def small_lists_claim(rows: list[Row]) -> Claim | None:
    small = [row for row in rows if row.workload.startswith("100x") and row.operation == Operation.CLIPPED.value]
    return worst(f"8 to 48 MB, clipped, wall time, torch foreach / {OURS}", small, OURS, wall_ratio, SMALL_LIST, "x")


def many_tensors_claim(rows: list[Row]) -> Claim | None:
    many = [row for row in rows if row.workload == "2000x1024"]
    name = f"2,000 tensors of 4 KB, wall time, torch foreach / {OURS}"
    return worst(name, many, OURS, wall_ratio, MANY_TENSORS, "x")


def host_claim(rows: list[Row]) -> Claim | None:
    def share(row: Row, one: Measurement) -> float:
        return (one.host_us or float("inf")) / (HOST_US + HOST_US_PER_TENSOR * row.tensors)

    name = f"host time of a call over ({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor), {OURS}"
    hosts = [row for row in rows if row.workload.startswith("host-")]
    return worst(name, hosts, OURS, share, 1.0, "of what is allowed", more_is_better=False)


def published_claims(rows: list[Row]) -> Iterator[Claim]:
    for row in rows:
        bar, published = PUBLISHED.get((row.workload, row.dtype, Operation(row.operation)), (None, ""))
        name = f"{row.title}, {row.dtype}, {row.operation}, wall time, {OURS}"
        if bar is None:
            continue
        claim = worst(name, [row], OURS, _wall_ms, bar, "ms", more_is_better=False)
        if claim is not None:
            claim.note = published
            yield claim


def _wall_ms(row: Row, one: Measurement) -> float:
    return (one.p50_us or float("inf")) / 1e3


def step_claims(steps: list[dict[str, Any]]) -> Iterator[Claim]:
    """From what `optimizer_step` measured; its ratios are to the bare step, and to torch's two calls."""
    ratio = {(one["way"], one["operation"]): one["ratio"] for one in steps}
    if not ratio:
        return
    pairs = {operation: 1 / ratio[UNSCALE_OURS, operation] for operation in ("not clipped", "clipped")}
    least = min(pairs, key=pairs.__getitem__)
    name = f"unscale + clip, >= 1 GB: {UNSCALE_TORCH} / ours"
    yield Claim(name, pairs[least], UNSCALE, "x", True, f"worst of 2: {least}")
    ways = {way: ratio[way, "not clipped"] for way in (DROP_IN, SCALES, DEFERS, CHOOSES)}
    best = min(ways, key=ways.__getitem__)
    note = f"{best}; torch's clip: {ratio[TORCH, 'not clipped']:.2f}"
    yield Claim("(clip + fused AdamW) / AdamW, 1 GB of fp32, not clipped", ways[best], STEP, "x", False, note)
