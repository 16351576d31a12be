"""The project's promises on a GPU, from the rows, steps and ceilings of one report.

Times are the device's own, the host running ahead, except where a promise says wall time or host time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.claims import HOST_US, HOST_US_PER_TENSOR
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.operations import Operation
from benchmarks.optimizer_step import CHOOSES, DEFERS, DROP_IN, LIMITS, SCALES, TORCH, UNSCALE_OURS, UNSCALE_TORCH
from benchmarks.results import Claim, Measurement, Report, Row

CUDA, TRITON = "fusedclip cuda", "fusedclip triton"
LARGE = 10**9  # bytes
LARGE_DTYPES = ("float32", "bfloat16")
READ_FRACTION = {CUDA: 0.93, TRITON: 0.88}
# (workload, dtype, operation) -> milliseconds of wall time, and what others have published for an H100:
# NVIDIA-NeMo/Automodel pull request 3685, TransformerEngine's kernels and its own Triton ones.
PUBLISHED = {
    ("500x450000", "mixed", Operation.CLIPPED): (1.2, "published: TransformerEngine 3.93 ms, NeMo Automodel 3.73 ms"),
    ("one-1.536e9", "bfloat16", Operation.CLIPPED): (
        3.6,
        "published: TransformerEngine 7.89 ms, NeMo Automodel 7.32 ms",
    ),
    ("one-1.536e9", "bfloat16", Operation.NOT_CLIPPED): (1.2, "published, clipped or not: 7.89 ms and 7.32 ms"),
}


@dataclass(frozen=True)
class Promise:
    """Of the rows that it concerns the worst one counts, and is named in the claim."""

    name: str
    concerns: Callable[[Row], bool]
    value: Callable[[Row, Measurement], float]
    bar: float
    unit: str
    engine: str = CUDA
    more_is_better: bool = True
    note: str = ""

    def claim(self, rows: list[Row]) -> Claim | None:
        """None if no row concerns it, or none has its engine."""
        values = [one for row in rows if self.concerns(row) if (one := self._judge(row))]
        if not values:
            return None
        worst, why = (min if self.more_is_better else max)(values)
        note = f"{self.note}; " if self.note else ""
        note += f"worst of {len(values)}: {why}" if len(values) > 1 or math.isinf(worst) or not worst else why
        return Claim(self.name, worst, self.bar, self.unit, self.more_is_better, note)

    def _judge(self, row: Row) -> tuple[float, str] | None:
        """The value in this row, and the row's name; the worst there is, and the reason, for a wrong answer."""
        one, foreach = row.find(self.engine), row.find(TORCH_FOREACH)
        name = f"{row.title}, {row.dtype}, {row.operation}"
        if one is None or not (one.failure or one.device_us):
            return None
        if one.failure:
            return 0.0 if self.more_is_better else math.inf, f"{name}: {one.failure}"
        if foreach is not None and foreach.failure:
            name += f" ({TORCH_FOREACH}: {foreach.failure})"
        return self.value(row, one), name


def claims(report: Report) -> list[Claim]:
    """A claim for each promise for which the report has a measurement."""
    found = [promise.claim(report.rows) for promise in promises(report.gpu.get("ceilings"))]
    return [*filter(None, found), *step_claims(report.steps)]


def missing(report: Report) -> list[str]:
    """The names of the promises that the report says nothing of."""
    ceilings = report.gpu.get("ceilings") or {"read": math.nan, "copy": math.nan}
    names = [*(promise.name for promise in promises(ceilings)), UNSCALE_NAME, STEP_NAME]
    told = {claim.name for claim in report.claims}
    return [name for name in names if name not in told]


def promises(ceilings: dict[str, Any] | None) -> Iterator[Promise]:
    if ceilings:
        read, copy = float(ceilings["read"]), float(ceilings["copy"])
        yield from ceiling_promises(read, copy)
    large, clipped = "not clipped, >= 1 GB", "clipped, >= 1 GB"
    yield Promise(f"{large}, torch foreach / {CUDA}", is_large(Operation.NOT_CLIPPED), device_ratio, 2.8, "x")
    yield Promise(f"{clipped}, torch foreach / {CUDA}", is_large(Operation.CLIPPED), device_ratio, 1.05, "x")
    yield Promise(f"8 to 48 MB, clipped, wall time, torch foreach / {CUDA}", is_small_list, wall_ratio, 2.0, "x")
    many = f"2,000 tensors of 4 KB, wall time, torch foreach / {CUDA}"
    yield Promise(many, lambda row: row.workload == "2000x1024", wall_ratio, 10.0, "x")
    host = f"host time of a call over ({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor), {CUDA}"
    yield Promise(host, lambda row: row.is_host, host_share, 1.0, "of what is allowed", more_is_better=False)
    for key, (bar, published) in PUBLISHED.items():
        yield published_promise(*key, bar, published)


def ceiling_promises(read: float, copy: float) -> Iterator[Promise]:
    """Against GB/s of reading and of copying."""

    def read_us(row: Row) -> float:
        """A plain sum timed among the row's own calls may have been faster than the ceiling."""
        at_ceiling = row.bytes / read / 1e3
        return min(at_ceiling, row.floor.device_us or at_ceiling)

    def norm_fraction(row: Row, one: Measurement) -> float:
        return read_us(row) / _or_inf(one.device_us)

    def clipped_fraction(row: Row, one: Measurement) -> float:
        return (read_us(row) + 2 * row.bytes / copy / 1e3) / _or_inf(one.device_us)

    for (engine, bar), dtype in product(READ_FRACTION.items(), LARGE_DTYPES):
        concerns, name = is_large(Operation.NORM, dtype), f"norm pass, >= 1 GB, {dtype}, {engine}"
        yield Promise(name, concerns, norm_fraction, bar, "of the read ceiling", engine)
    name = f"clipped, >= 1 GB, (N / read ceiling + 2 N / copy ceiling) / time, {CUDA}"
    yield Promise(name, is_large(Operation.CLIPPED), clipped_fraction, 0.90, "of the ceilings")


def published_promise(workload: str, dtype: str, operation: Operation, bar: float, published: str) -> Promise:
    def concerns(row: Row) -> bool:
        return (row.workload, row.dtype, row.operation) == (workload, dtype, operation.value)

    name = f"{workload} {dtype} {operation.value}, wall time, {CUDA}"
    return Promise(name, concerns, wall_ms, bar, "ms", more_is_better=False, note=published)


def is_large(operation: Operation, dtype: str = "") -> Callable[[Row], bool]:
    dtypes = (dtype,) if dtype else LARGE_DTYPES
    return lambda row: row.bytes >= LARGE and row.dtype in dtypes and row.operation == operation.value


def is_small_list(row: Row) -> bool:
    return row.workload.startswith("100x") and row.operation == Operation.CLIPPED.value


def device_ratio(row: Row, ours: Measurement) -> float:
    return _ratio(row.find(TORCH_FOREACH), ours, "device_us")


def wall_ratio(row: Row, ours: Measurement) -> float:
    return _ratio(row.find(TORCH_FOREACH), ours, "p50_us")


def _ratio(foreach: Measurement | None, ours: Measurement, time: str) -> float:
    """0 where torch was not timed: nothing is claimed against nobody."""
    theirs = getattr(foreach, time, None)
    return float(theirs / _or_inf(getattr(ours, time))) if theirs else 0.0


def host_share(row: Row, one: Measurement) -> float:
    return _or_inf(one.host_us) / (HOST_US + HOST_US_PER_TENSOR * row.tensors)


def wall_ms(row: Row, one: Measurement) -> float:
    return _or_inf(one.p50_us) / 1e3


def _or_inf(us: float | None) -> float:
    return us or math.inf


UNSCALE_NAME = f"unscale + clip, >= 1 GB: {UNSCALE_TORCH} / ours"
STEP_NAME = "(clip + fused AdamW) / AdamW, >= 1 GB of fp32, not clipped, best way"
LEAST_UNSCALE, MOST_STEP = 1.6, 1.16


def step_claims(steps: list[dict[str, Any]]) -> Iterator[Claim]:
    """From what `optimizer_step` measured; its ratios are to the bare step, and to torch's two calls."""
    ratio = {(one["way"], one["operation"]): one["ratio"] for one in steps if one["nbytes"] >= LARGE}
    if not ratio:
        return
    gains = {operation: 1 / ratio[UNSCALE_OURS, operation] for operation in LIMITS}
    least = min(gains, key=gains.__getitem__)
    yield Claim(UNSCALE_NAME, gains[least], LEAST_UNSCALE, "x", True, f"worst of {len(gains)}: {least}")
    ways = {way: ratio[way, "not clipped"] for way in (DROP_IN, SCALES, DEFERS, CHOOSES)}
    best = min(ways, key=ways.__getitem__)
    note = f"{best}; torch's clip: {ratio[TORCH, 'not clipped']:.2f}"
    yield Claim(STEP_NAME, ways[best], MOST_STEP, "x", False, note)
