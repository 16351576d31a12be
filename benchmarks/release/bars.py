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

from benchmarks import optimizer_step as ways
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.health import GRAD_STATS, MONITOR
from benchmarks.operations import Operation
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
HOST = f"({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor)"
STEP_RATIO = {NOT_CLIPPED: 1.35, CLIPPED: 1.45}  # (clip + step) / step, best way
# Our own step, with a limit that clips and one that does not, over that of torch's fused AdamW without a clip.
OWN_RATIO = {
    (ways.OWN, ways.MODEL): 1.17,
    (ways.OWN_BF16, ways.MODEL): 0.95,
    (ways.OWN_SPLIT, ways.MODEL): 1.05,
    (ways.OWN + ways.NO_LIMIT, ways.MODEL): 1.02,
    (ways.OWN, ways.SMALL): 0.35,
}
UNSCALE = 1.6  # torch's two calls / ours

LARGE, LARGE_DTYPES = 10**9, ("float32", "bfloat16")  # bytes
READ_FRACTION = {CUDA: 0.93, TRITON: 0.88}
# Milliseconds of wall time, and what others have published for an H100: NVIDIA-NeMo/Automodel pull request 3685,
# TransformerEngine's kernels and its own Triton ones.
PUBLISHED: dict[Key, tuple[float, str]] = {
    ("500x450000", "mixed", CLIPPED): (1.2, "published: TransformerEngine 3.93 ms, NeMo Automodel 3.73 ms"),
    ("one-1.536e9", "bfloat16", CLIPPED): (3.6, "published: TransformerEngine 7.89 ms, NeMo Automodel 7.32 ms"),
    ("one-1.536e9", "bfloat16", NOT_CLIPPED): (1.2, "published, clipped or not: 7.89 ms and 7.32 ms"),
}

Concerns = Callable[[Row], bool]
Value = Callable[[Row, Measurement], float]
Ceilings = Mapping[str, Any]  # GB/s under "read" and "copy"; empty where nobody measured them


@dataclass(frozen=True)
class Bar:
    """A promise about rows of one device: of those that it concerns the worst counts, and is named in the claim."""

    name: str
    concerns: Concerns
    value: Value | None
    """None where what it needs was not measured."""
    bar: float
    unit: str = "x"
    of: tuple[str, ...] = ()
    """Whose value: the fastest of these contenders, or else fusedclip on its preferred engine."""
    more_is_better: bool = True
    remark: Callable[[Row, Measurement], str] = lambda row, one: ""
    """What is to be said of the row that counts."""
    instead: "Bar | None" = None
    """Counts where this one does not hold and that one does."""

    def claim(self, rows: Sequence[Row]) -> Claim | None:
        """None if no row concerns it, or none has what it is about."""
        values = [found for row in rows if self.concerns(row) and (found := self._judge(row))]
        if not values:
            return None
        worst, why, remark = (min if self.more_is_better else max)(values)
        note = f"worst of {len(values)}: " * (len(values) > 1) + "; ".join(filter(None, (why, remark)))
        claim = Claim(self.name, worst, self.bar, self.unit, self.more_is_better, note)
        other = self.instead.claim(rows) if self.instead and not claim.holds else None
        if other is None or not other.holds:
            return claim
        other.note = f"{worst:.2f}{self.unit} falls short of {self.bar}{self.unit} ({self.name}); {note}"
        return other

    def _judge(self, row: Row) -> tuple[float, str, str] | None:
        """The value in this row, the row's name, a remark; for a wrong answer the worst there is, and the reason."""
        found = [one for one in row.contenders if one.contender in self.of] if self.of else [row.ours]
        one = min(filter(None, found), key=lambda one: (not one.failure, one.device_us), default=None)
        if one is None or self.value is None:
            return None
        name, value = f"{row.title}, {row.dtype}, {row.operation}", self.value(row, one)
        if wrong := next((each for each in (one, row.find(TORCH_FOREACH)) if each.failure), None):
            name += f" ({wrong.contender}: {wrong.failure})"
        if one.failure or math.isnan(value):
            return 0.0 if self.more_is_better else math.inf, name, ""
        return value, name, self.remark(row, one)


def claims(report: Report) -> list[Claim]:
    """A claim for each bar for which the report has a measurement."""
    bars = {"cpu": CPU_BARS, "cuda": gpu_bars(report.gpu.get("ceilings", {}))}
    rows = {device: [row for row in report.rows if row.device == device] for device in bars}
    return [claim for device in bars for bar in bars[device] if (claim := bar.claim(rows[device]))]


def missing(report: Report) -> list[str]:
    """The names of the GPU's bars that the report says nothing of."""
    claimed = {claim.name for claim in report.claims}
    return [bar.name for bar in gpu_bars({}) if bar.name not in claimed]


def where(operation: str = "*", workload: str = "*", dtype: str = "*", least: int = 0) -> Concerns:
    """Rows whose names fit these patterns, with so many bytes or more; of large ones only in LARGE_DTYPES."""
    wanted = f"{operation}; {workload}; {dtype}"

    return lambda row: (
        fnmatchcase(f"{row.operation}; {row.workload}; {row.dtype}", wanted)
        and (not least or (row.bytes >= least and row.dtype in LARGE_DTYPES))
    )


def norms(small_fp32: bool) -> Concerns:
    """Rows whose answer is a norm: those for which a smaller error is promised, or the others."""

    def concerns(row: Row) -> bool:
        has_norm = not row.is_step and row.operation != Operation.VALUE.value
        return has_norm and small_fp32 == (row.dtype == "float32" and row.elements <= 1 << 24)

    return concerns


def over_ours(base: str, time: str = "device_us") -> Value:
    """How many times as long the contender `base` takes."""
    return lambda row, ours: float(getattr(row.find(base), time) / getattr(ours, time))


def over_first(row: Row, way: Measurement) -> float:
    """The time over that of the row's first way: of a step with clipping over the step alone."""
    return way.device_us / row.contenders[0].device_us


def beside_torchs_clip(row: Row, way: Measurement) -> str:
    return f"{way.contender}; torch's clip: {over_first(row, row.find(ways.TORCH)):.2f}"


def fraction_of_floor(row: Row, ours: Measurement) -> float:
    """Of the floor's p20, not its median: a floor that was disturbed must not excuse a slow call."""
    return row.floor.p20_us / ours.p50_us


def beside_floor(row: Row, ours: Measurement) -> str:
    return f"{fraction_of_floor(row, ours):.0%} of the read floor" + (row.disturbance and f"; {row.disturbance}")


def host_share(row: Row, ours: Measurement) -> float:
    """Of what is allowed; on a CPU beyond reading the same bytes as one tensor, by the p20 of that, since what
    disturbs a short sum must not be subtracted.
    """
    spent = ours.p50_us - row.floor.p20_us if row.device == "cpu" else ours.host_us
    return spent / (HOST_US + HOST_US_PER_TENSOR * row.tensors)


def of_ceilings(ceilings: Ceilings, copies: int) -> Value | None:
    """The time of reading the bytes once and of `copies` times moving them at the ceilings, over the call's."""
    if not ceilings:
        return None

    def value(row: Row, one: Measurement) -> float:
        read, copy = (row.bytes / float(ceilings[name]) / 1e3 for name in ("read", "copy"))
        # A plain sum timed among the row's own calls may have been faster than the ceiling.
        return (min(read, row.floor.device_us) + copies * copy) / one.device_us

    return value


at_most = partial(Bar, more_is_better=False)
norm_error = partial(at_most, value=lambda row, ours: ours.norm_error, unit="relative")
step = partial(at_most, value=over_first, remark=beside_torchs_clip)
under_torchs = partial(step, of=(ways.DROP_IN, ways.SCALES, ways.DEFERS, ways.CHOOSES))
unscale = partial(Bar, value=over_ours(ways.UNSCALE_TORCH), bar=UNSCALE, of=(ways.UNSCALE_OURS,))


def ratio_on_the_cpu(key: Key, bar: float) -> Bar:
    workload, dtype, operation = key
    of, these = f"{CATALOGUE[workload].title}, {dtype}, {operation.value}", where(operation.value, workload, dtype)
    floor = Bar(f"{of}, time of reading / time", these, fraction_of_floor, FLOOR_FRACTION, "of the read floor")
    instead = floor if operation is NOT_CLIPPED else None
    wall = over_ours(TORCH_FOREACH, "p50_us")
    return Bar(f"{of}, torch foreach / fusedclip", these, wall, bar, remark=beside_floor, instead=instead)


CPU_BARS = [
    *(ratio_on_the_cpu(*one) for one in RATIOS.items()),
    at_most(f"host cost over {HOST}", where(workload="*x8"), host_share, 1.0, "of it"),
    norm_error("norm against fp64, fp32 up to 2^24 elements", norms(small_fp32=True), bar=1e-7),
    norm_error("norm against fp64, everything else", norms(small_fp32=False), bar=3e-6),
    *(
        under_torchs(f"(clip + step) / step, {one.value}", where(f"step, {one.value}", ways.MODEL), bar=STEP_RATIO[one])
        for one in BOTH
    ),
    *(
        step(f"{way} / step alone, {CATALOGUE[model].title}", where("step, *", model), bar=bar, of=(way,))
        for (way, model), bar in OWN_RATIO.items()
    ),
    *(unscale(f"torch's unscale_ + clip / ours, {one.value}", where(f"unscale, {one.value}")) for one in BOTH),
    at_most("clip by a GradMonitor / clip", where("monitor, not clipped"), over_first, 1.10, of=(MONITOR,)),
    at_most("statistics / norms of each tensor", where("statistics"), over_first, 1.15, of=(*GRAD_STATS.values(),)),
]


def gpu_bars(ceilings: Ceilings) -> list[Bar]:
    """Those that are of the ceilings say nothing where nobody measured these."""
    large, by_torch, of = partial(where, least=LARGE), f"torch foreach / {CUDA}", (CUDA,)
    device, wall = (over_ours(TORCH_FOREACH, time) for time in ("device_us", "p50_us"))
    both, of_both = f"(N / read ceiling + 2 N / copy ceiling) / time, {CUDA}", of_ceilings(ceilings, copies=2)

    def reading(engine: str, dtype: str) -> Bar:
        name, value = f"norm pass, >= 1 GB, {dtype}, {engine}", of_ceilings(ceilings, copies=0)
        return Bar(name, large("norm", dtype=dtype), value, READ_FRACTION[engine], "of the read ceiling", (engine,))

    def published(key: Key, bar: float, note: str) -> Bar:
        workload, dtype, operation = key
        name, these = f"{workload} {dtype} {operation.value}, wall time", where(operation.value, workload, dtype)
        wall_ms = partial(at_most, value=lambda row, ours: ours.p50_us / 1e3, unit="ms", of=of)
        return wall_ms(f"{name}, {CUDA}", these, bar=bar, remark=lambda *_: note)

    return [
        *(reading(*one) for one in product(READ_FRACTION, LARGE_DTYPES)),
        Bar(f"clipped, >= 1 GB, {both}", large("clipped"), of_both, 0.90, "of the ceilings", of),
        Bar(f"not clipped, >= 1 GB, {by_torch}", large("not clipped"), device, 2.8, of=of),
        Bar(f"clipped, >= 1 GB, {by_torch}", large("clipped"), device, 1.05, of=of),
        Bar(f"8 to 48 MB, clipped, wall time, {by_torch}", where("clipped", "100x*"), wall, 2.0, of=of),
        Bar(f"2,000 tensors of 4 KB, wall time, {by_torch}", where("*", "2000x1024"), wall, 10.0, of=of),
        at_most(f"host time of a call over {HOST}, {CUDA}", where("*", "host-*"), host_share, 1.0, "of it", of),
        *(published(key, *bar) for key, bar in PUBLISHED.items()),
        unscale(f"unscale + clip, >= 1 GB: {ways.UNSCALE_TORCH} / ours", large("unscale, *")),
        under_torchs(
            "(clip + fused AdamW) / AdamW, >= 1 GB, not clipped, best way", large("step, not clipped"), bar=1.16
        ),
    ]
