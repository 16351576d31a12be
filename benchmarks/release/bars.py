"""Every promise of the project with its bar, and the claims that a report makes of them: value beside bar.

Times on a GPU are the device's own, the host running ahead, except where a promise says wall time or host time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Any

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.operations import Operation
from benchmarks.optimizer_step import CHOOSES, DEFERS, DROP_IN, SCALES, STEP, TORCH, UNSCALE_OURS, UNSCALE_TORCH
from benchmarks.results import Claim, Measurement, Report, Row
from benchmarks.suites import BOTH
from benchmarks.workloads import CATALOGUE

CUDA, TRITON = "fusedclip cuda", "fusedclip triton"
NOT_CLIPPED, CLIPPED = BOTH
Key = tuple[str, str, Operation]  # workload, dtype, operation

# How many times faster than torch's foreach path, on two CPU cores.
RATIOS: dict[Key, float] = {
    ("gpt2", "float32", NOT_CLIPPED): 3.3,
    ("gpt2", "bfloat16", NOT_CLIPPED): 3.4,
    ("gpt2", "float16", NOT_CLIPPED): 8.0,
    ("gpt2", "float32", CLIPPED): 1.1,
    ("gpt2", "bfloat16", CLIPPED): 1.25,
    ("gpt2", "float16", CLIPPED): 3.0,
    ("1000x256", "float32", NOT_CLIPPED): 15.0,
    ("5000x64", "float32", CLIPPED): 12.0,
    ("300x4096", "float32", NOT_CLIPPED): 11.0,
}
# A not-clipped call that takes no longer than reading its bytes / 0.92 can't be asked to be faster.
FLOOR_FRACTION = 0.92
HOST_US, HOST_US_PER_TENSOR = 10.0, 0.12
NORM_ERROR, NORM_ERROR_FP32 = 3e-6, 1e-7
STEP_RATIO = {NOT_CLIPPED: 1.35, CLIPPED: 1.45}  # (clip + step) / step, best way
UNSCALE = 1.6  # torch's two calls / ours

LARGE, LARGE_DTYPES = 10**9, ("float32", "bfloat16")  # bytes
READ_FRACTION = {CUDA: 0.93, TRITON: 0.88}
STEP_RATIO_GPU = 1.16
# Milliseconds of wall time, and what others have published for an H100: NVIDIA-NeMo/Automodel pull request 3685,
# TransformerEngine's kernels and its own Triton ones.
PUBLISHED: dict[Key, tuple[float, str]] = {
    ("500x450000", "mixed", CLIPPED): (1.2, "published: TransformerEngine 3.93 ms, NeMo Automodel 3.73 ms"),
    ("one-1.536e9", "bfloat16", CLIPPED): (3.6, "published: TransformerEngine 7.89 ms, NeMo Automodel 7.32 ms"),
    ("one-1.536e9", "bfloat16", NOT_CLIPPED): (1.2, "published, clipped or not: 7.89 ms and 7.32 ms"),
}

Ceilings = Mapping[str, Any]  # GB/s under "read" and "copy"; empty where nobody measured them
Value = Callable[[Row, Measurement, Ceilings], float | None]


@dataclass(frozen=True)
class Bar:
    """A promise about rows of one device: of those that it concerns the worst counts, and is named in the claim."""

    name: str
    device: str
    concerns: Callable[[Row], bool]
    value: Value
    bar: float
    unit: str
    of: tuple[str, ...] = ()
    """Whose value: the fastest of these contenders, or else fusedclip on its preferred engine."""
    more_is_better: bool = True
    note: str = ""
    remark: Callable[[Row, Measurement], str] = lambda row, one: ""
    """What is to be said of the row that counts."""
    instead: "Bar | None" = None
    """Counts where this one does not hold and that one does."""

    def claim(self, rows: Sequence[Row], ceilings: Ceilings) -> Claim | None:
        """None if no row concerns it, or none has what it is about."""
        concerned = [row for row in rows if row.device == self.device and self.concerns(row)]
        values = [found for row in concerned if (found := self._judge(row, ceilings))]
        if not values:
            return None
        worst, why, remark = (min if self.more_is_better else max)(values)
        why = f"worst of {len(values)}: {why}" if len(values) > 1 else why
        note = "; ".join(filter(None, (self.note, why, remark)))
        claim = Claim(self.name, worst, self.bar, self.unit, self.more_is_better, note)
        other = self.instead.claim(rows, ceilings) if self.instead and not claim.holds else None
        if other is None or not other.holds:
            return claim
        other.note = f"{worst:.2f}{self.unit} falls short of {self.bar}{self.unit} ({self.name}); {note}"
        return other

    def _judge(self, row: Row, ceilings: Ceilings) -> tuple[float, str, str] | None:
        """The value in this row, the row's name, a remark; for a wrong answer the worst there is, and the reason."""
        ways = [one for name in self.of if (one := row.find(name)) and (one.failure or one.device_us)]
        one = min(ways, key=lambda one: one.device_us or 0.0, default=None) if self.of else row.ours
        if one is None:
            return None
        name = f"{row.title}, {row.dtype}, {row.operation}"
        if one.failure:
            return 0.0 if self.more_is_better else math.inf, f"{name}: {one.failure}", ""
        if (foreach := row.find(TORCH_FOREACH)) and foreach.failure:
            name += f" ({TORCH_FOREACH}: {foreach.failure})"
        value = self.value(row, one, ceilings)
        return None if value is None else (value, name, self.remark(row, one))


def claims(report: Report) -> list[Claim]:
    """A claim for each bar for which the report has a measurement."""
    ceilings = report.gpu.get("ceilings", {})
    return [claim for bar in BARS if (claim := bar.claim(report.rows, ceilings))]


def missing(report: Report) -> list[str]:
    """The names of the GPU's bars that the report says nothing of."""
    claimed = {claim.name for claim in report.claims}
    return [bar.name for bar in BARS if bar.device == "cuda" and bar.name not in claimed]


def where(operation: str = "*", workload: str = "*", dtype: str = "*", least: int = 0) -> Callable[[Row], bool]:
    """Rows whose names fit these patterns, with so many bytes or more; of large ones only in LARGE_DTYPES."""

    def concerns(row: Row) -> bool:
        names = zip((row.operation, row.workload, row.dtype), (operation, workload, dtype), strict=True)
        enough = row.bytes >= least and (not least or row.dtype in LARGE_DTYPES)
        return enough and all(fnmatchcase(name, pattern) for name, pattern in names)

    return concerns


def has_norm(row: Row) -> bool:
    return not row.is_step and row.operation != Operation.VALUE.value


def is_small_fp32(row: Row) -> bool:
    return has_norm(row) and row.dtype == "float32" and row.elements <= 1 << 24


def over_ours(base: str, time: str = "device_us") -> Value:
    """How many times as long the contender `base` takes; 0 if it has no time."""
    return lambda row, ours, _: (getattr(row.find(base), time, None) or 0.0) / _or_inf(getattr(ours, time))


def over_step(row: Row, way: Measurement, _: Ceilings) -> float:
    """The time of clipping and stepping over that of the step alone."""
    alone = row.find(STEP)
    return _or_inf(way.device_us) / (alone.device_us or 1.0) if alone else math.inf


def beside_torchs_clip(row: Row, way: Measurement) -> str:
    return f"{way.contender}; torch's clip: {over_step(row, row.find(TORCH) or way, {}):.2f}"


def fraction_of_floor(row: Row, ours: Measurement, _: Ceilings) -> float:
    """Of the floor's p20, not its median: a floor that was disturbed must not excuse a slow call."""
    return (row.floor.p20_us or 0.0) / _or_inf(ours.p50_us)


def beside_floor(row: Row, ours: Measurement) -> str:
    return f"{fraction_of_floor(row, ours, {}):.0%} of the read floor" + (row.disturbance and f"; {row.disturbance}")


def host_share_beyond_floor(row: Row, ours: Measurement, _: Ceilings) -> float:
    """Beyond reading the same bytes as one tensor, by its p20: what disturbs a short sum must not be subtracted."""
    return (_or_inf(ours.p50_us) - (row.floor.p20_us or 0.0)) / (HOST_US + HOST_US_PER_TENSOR * row.tensors)


def host_share(row: Row, one: Measurement, _: Ceilings) -> float:
    return _or_inf(one.host_us) / (HOST_US + HOST_US_PER_TENSOR * row.tensors)


def wall_ms(row: Row, one: Measurement, _: Ceilings) -> float:
    return _or_inf(one.p50_us) / 1e3


def norm_error(row: Row, ours: Measurement, _: Ceilings) -> float:
    """No answer, or not a number, counts as an error of 1."""
    error = ours.norm_error
    return error if error is not None and math.isfinite(error) else 1.0


def fraction_of_ceilings(copies: int) -> Value:
    """The time of reading the bytes once and of `copies` times moving them at the ceilings, over the call's."""

    def value(row: Row, one: Measurement, ceilings: Ceilings) -> float | None:
        if not ceilings:
            return None
        read, copy = (row.bytes / float(ceilings[name]) / 1e3 for name in ("read", "copy"))
        # A plain sum timed among the row's own calls may have been faster than the ceiling.
        return (min(read, row.floor.device_us or read) + copies * copy) / _or_inf(one.device_us)

    return value


def _or_inf(us: float | None) -> float:
    return us or math.inf


def ratio_on_the_cpu(key: Key, bar: float) -> Bar:
    (workload, dtype, operation), unit = key, "of the read floor"
    of, these = f"{CATALOGUE[workload].title}, {dtype}, {operation.value}", where(operation.value, workload, dtype)
    floor = Bar(f"{of}, time of reading / time", "cpu", these, fraction_of_floor, FLOOR_FRACTION, unit)
    instead = floor if operation is NOT_CLIPPED else None
    ratio = over_ours(TORCH_FOREACH, "p50_us")
    name = f"{of}, torch foreach / fusedclip"
    return Bar(name, "cpu", these, ratio, bar, "x", remark=beside_floor, instead=instead)


def published(key: Key, bar: float, note: str) -> Bar:
    workload, dtype, operation = key
    name, these = f"{workload} {dtype} {operation.value}, wall time, {CUDA}", where(operation.value, workload, dtype)
    return Bar(name, "cuda", these, wall_ms, bar, "ms", (CUDA,), more_is_better=False, note=note)


less = partial(Bar, more_is_better=False)
step = partial(less, value=over_step, unit="x", of=(DROP_IN, SCALES, DEFERS, CHOOSES), remark=beside_torchs_clip)
unscale = partial(Bar, value=over_ours(UNSCALE_TORCH), bar=UNSCALE, unit="x", of=(UNSCALE_OURS,))
cuda = partial(Bar, device="cuda", of=(CUDA,))
device, wall = over_ours(TORCH_FOREACH), over_ours(TORCH_FOREACH, "p50_us")
read, clipped = fraction_of_ceilings(copies=0), fraction_of_ceilings(copies=2)
HOST = f"({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor)"
AT_CEILINGS, BY_TORCH = "(N / read ceiling + 2 N / copy ceiling) / time", f"torch foreach / {CUDA}"
# fmt: off
BARS = [
    *(ratio_on_the_cpu(*one) for one in RATIOS.items()),
    less(f"host cost over {HOST}", "cpu", where(workload="*x8"), host_share_beyond_floor, 1.0, "of it"),
    less("norm against fp64, fp32 up to 2^24 elements", "cpu", is_small_fp32, norm_error, NORM_ERROR_FP32, "relative"),
    less("norm against fp64, everything else", "cpu", lambda row: has_norm(row) and not is_small_fp32(row),
         norm_error, NORM_ERROR, "relative"),
    *(step(f"(clip + step) / step, {operation.value}", "cpu", where(f"step, {operation.value}"), bar=bar)
      for operation, bar in STEP_RATIO.items()),
    *(unscale(f"torch's unscale_ + clip / ours, {operation.value}", "cpu", where(f"unscale, {operation.value}"))
      for operation in BOTH),
    *(Bar(f"norm pass, >= 1 GB, {dtype}, {engine}", "cuda", where("norm", dtype=dtype, least=LARGE), read, bar,
          "of the read ceiling", (engine,))
      for (engine, bar), dtype in product(READ_FRACTION.items(), LARGE_DTYPES)),
    cuda(f"clipped, >= 1 GB, {AT_CEILINGS}, {CUDA}", concerns=where("clipped", least=LARGE), value=clipped, bar=0.90,
         unit="of the ceilings"),
    cuda(f"not clipped, >= 1 GB, {BY_TORCH}", concerns=where("not clipped", least=LARGE), value=device, bar=2.8,
         unit="x"),
    cuda(f"clipped, >= 1 GB, {BY_TORCH}", concerns=where("clipped", least=LARGE), value=device, bar=1.05, unit="x"),
    cuda(f"8 to 48 MB, clipped, wall time, {BY_TORCH}", concerns=where("clipped", "100x*"), value=wall, bar=2.0,
         unit="x"),
    cuda(f"2,000 tensors of 4 KB, wall time, {BY_TORCH}", concerns=where(workload="2000x1024"), value=wall, bar=10.0,
         unit="x"),
    cuda(f"host time of a call over {HOST}, {CUDA}", concerns=where(workload="host-*"), value=host_share, bar=1.0,
         unit="of it", more_is_better=False),
    *(published(key, *bar) for key, bar in PUBLISHED.items()),
    unscale(f"unscale + clip, >= 1 GB: {UNSCALE_TORCH} / ours", "cuda", where("unscale, *", least=LARGE)),
    step("(clip + fused AdamW) / AdamW, >= 1 GB, not clipped, best way", "cuda",
         where("step, not clipped", least=LARGE), bar=STEP_RATIO_GPU),
]
# fmt: on
