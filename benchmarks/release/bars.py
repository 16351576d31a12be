"""Every promise of the project with its bar, and the claims that a report makes of them: value beside bar.

Times on a GPU are the device's own, the host running ahead, except where a promise says wall time or host time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from benchmarks import optimizer_step as ways
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.health import GRAD_STATS, MONITOR
from benchmarks.results import Claim, Measurement, Report, Row
from benchmarks.suites import BOTH, Operation
from benchmarks.workloads import CATALOGUE

CUDA, TRITON = "fusedclip cuda", "fusedclip triton"

# A not-clipped call that takes no longer than reading its bytes / 0.92 can't be asked to be faster.
FLOOR_FRACTION = 0.92
HOST_US, HOST_US_PER_TENSOR = 10.0, 0.12
HOST = f"({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor)"
LARGE, LARGE_DTYPES = 10**9, ("float32", "bfloat16")  # bytes

Value = Callable[[Row, Measurement], float | None]  # None: the promise says nothing of this row
Ceilings = Mapping[str, float]  # GB/s under "read" and "copy"; empty where nobody measured them


@dataclass(frozen=True)
class Bar:
    """A promise about rows of one device: of those that it concerns the worst counts, and is named in the claim."""

    name: str
    rows: str  # a pattern for "operation; workload; dtype"
    value: Value
    bar: float
    unit: str = "x"
    of: tuple[str, ...] = ()  # whose value: the fastest of these contenders, or else fusedclip on its preferred engine
    least: int = 0  # bytes: if there is a least, only rows in LARGE_DTYPES count
    more_is_better: bool = True
    remark: Callable[[Row, Measurement], str] = lambda row, one: ""  # what is to be said of the row that counts
    instead: "Bar | None" = None  # counts where this one does not hold and that one does

    def claim(self, rows: Sequence[Row]) -> Claim | None:
        """None if no row concerns it, or none has what it is about."""
        values = [found for row in rows if (found := self._judge(row))]
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
        is_small = self.least and (row.bytes < self.least or row.dtype not in LARGE_DTYPES)
        if is_small or not fnmatchcase(f"{row.operation}; {row.workload}; {row.dtype}", self.rows):
            return None
        found = [one for one in row.contenders if one.contender in self.of] if self.of else [row.ours]
        one = min(filter(None, found), key=lambda one: (not one.failure, one.device_us), default=None)
        if one is None or (value := self.value(row, one)) is None:
            return None
        name = f"{row.title}, {row.dtype}, {row.operation}"
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


def norm_error(small_fp32: bool) -> Value:
    """Of rows whose answer is a norm: those for which a smaller error is promised, or the others."""

    def value(row: Row, ours: Measurement) -> float | None:
        has_norm = not row.is_step and row.operation != Operation.VALUE.value
        is_small = row.dtype == "float32" and row.elements <= 1 << 24
        return ours.norm_error if has_norm and is_small == small_fp32 else None

    return value


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


def of_ceilings(ceilings: Ceilings, copies: int) -> Value:
    """The time of reading the bytes once and of `copies` times moving them at the ceilings, over the call's."""

    def value(row: Row, one: Measurement) -> float | None:
        if not ceilings:
            return None
        read, copy = (row.bytes / ceilings[name] / 1e3 for name in ("read", "copy"))
        # A plain sum timed among the row's own calls may have been faster than the ceiling.
        return (min(read, row.floor.device_us) + copies * copy) / one.device_us

    return value


at_most = partial(Bar, more_is_better=False)
step = partial(at_most, value=over_first, remark=beside_torchs_clip)
under_torchs = partial(step, of=(ways.DROP_IN, ways.SCALES, ways.DEFERS, ways.CHOOSES))
unscale = partial(Bar, value=over_ours(ways.UNSCALE_TORCH), bar=1.6, of=(ways.UNSCALE_OURS,))


def faster(rows: str, bar: float) -> Bar:
    """Than torch's foreach path, on two CPU cores."""
    operation, workload, dtype = rows.split("; ")
    of = f"{CATALOGUE[workload].title}, {dtype}, {operation}"
    floor = Bar(f"{of}, time of reading / time", rows, fraction_of_floor, FLOOR_FRACTION, "of the read floor")
    instead, wall = floor if operation == "not clipped" else None, over_ours(TORCH_FOREACH, "p50_us")
    return Bar(f"{of}, torch foreach / fusedclip", rows, wall, bar, remark=beside_floor, instead=instead)


def own_step(way: str, model: str, bar: float) -> Bar:
    """With a limit that clips and one that does not, over torch's fused AdamW without a clip."""
    return step(f"{way} / step alone, {CATALOGUE[model].title}", f"step, *; {model}; *", bar=bar, of=(way,))


CPU_BARS = [
    faster("not clipped; gpt2; float32", 3.3),
    faster("not clipped; gpt2; bfloat16", 3.4),
    faster("not clipped; gpt2; float16", 8.0),
    faster("clipped; gpt2; float32", 1.1),
    faster("clipped; gpt2; bfloat16", 1.25),
    faster("clipped; gpt2; float16", 3.0),
    faster("not clipped; 1000x256; float32", 15.0),
    faster("clipped; 5000x64; float32", 12.0),
    faster("not clipped; 300x4096; float32", 11.0),
    at_most(f"host cost over {HOST}", "*; *x8; *", host_share, 1.0, "of it"),
    at_most("norm against fp64, fp32 up to 2^24 elements", "*", norm_error(small_fp32=True), 1e-7, "relative"),
    at_most("norm against fp64, everything else", "*", norm_error(small_fp32=False), 3e-6, "relative"),
    under_torchs("(clip + step) / step, not clipped", f"step, not clipped; {ways.MODEL}; *", bar=1.35),
    under_torchs("(clip + step) / step, clipped", f"step, clipped; {ways.MODEL}; *", bar=1.45),
    own_step(ways.OWN, ways.MODEL, 1.17),
    own_step(ways.OWN_BF16, ways.MODEL, 0.95),
    own_step(ways.OWN_SPLIT, ways.MODEL, 1.05),
    own_step(ways.OWN + ways.NO_LIMIT, ways.MODEL, 1.02),
    own_step(ways.OWN, ways.SMALL, 0.35),
    *(unscale(f"torch's unscale_ + clip / ours, {one.value}", f"unscale, {one.value}; *") for one in BOTH),
    at_most("clip by a GradMonitor / clip", "monitor, not clipped; *", over_first, 1.10, of=(MONITOR,)),
    at_most("statistics / norms of each tensor", "statistics; *", over_first, 1.15, of=(*GRAD_STATS.values(),)),
]


def gpu_bars(ceilings: Ceilings) -> list[Bar]:
    """Those that are of the ceilings say nothing where nobody measured these."""
    ours = partial(Bar, of=(CUDA,))
    large, by_torch = partial(ours, least=LARGE), f"torch foreach / {CUDA}"
    device, wall = (over_ours(TORCH_FOREACH, time) for time in ("device_us", "p50_us"))
    both, of_both = f"(N / read ceiling + 2 N / copy ceiling) / time, {CUDA}", of_ceilings(ceilings, copies=2)
    host = f"host time of a call over {HOST}, {CUDA}"
    best_way = "(clip + fused AdamW) / AdamW, >= 1 GB, not clipped, best way"

    def reading(engine: str, dtype: str, bar: float) -> Bar:
        name, once = f"norm pass, >= 1 GB, {dtype}, {engine}", of_ceilings(ceilings, copies=0)
        return large(name, f"norm; *; {dtype}", once, bar, "of the read ceiling", of=(engine,))

    def published(rows: str, ms: float, note: str) -> Bar:
        """Beside what NVIDIA-NeMo/Automodel's pull request 3685 says of TransformerEngine's kernels and its own."""
        operation, workload, dtype = rows.split("; ")
        name, wall_ms = f"{workload} {dtype} {operation}, wall time, {CUDA}", lambda row, ours: ours.p50_us / 1e3
        return ours(name, rows, wall_ms, ms, "ms", more_is_better=False, remark=lambda *_: f"published{note}")

    return [
        *(reading(engine, dtype, bar) for engine, bar in ((CUDA, 0.93), (TRITON, 0.88)) for dtype in LARGE_DTYPES),
        large(f"clipped, >= 1 GB, {both}", "clipped; *", of_both, 0.90, "of the ceilings"),
        large(f"not clipped, >= 1 GB, {by_torch}", "not clipped; *", device, 2.8),
        large(f"clipped, >= 1 GB, {by_torch}", "clipped; *", device, 1.05),
        ours(f"8 to 48 MB, clipped, wall time, {by_torch}", "clipped; 100x*; *", wall, 2.0),
        ours(f"2,000 tensors of 4 KB, wall time, {by_torch}", "*; 2000x1024; *", wall, 10.0),
        ours(host, "*; host-*; *", host_share, 1.0, "of it", more_is_better=False),
        published("clipped; 500x450000; mixed", 1.2, ": TransformerEngine 3.93 ms, NeMo Automodel 3.73 ms"),
        published("clipped; one-1.536e9; bfloat16", 3.6, ": TransformerEngine 7.89 ms, NeMo Automodel 7.32 ms"),
        published("not clipped; one-1.536e9; bfloat16", 1.2, ", clipped or not: 7.89 ms and 7.32 ms"),
        unscale(f"unscale + clip, >= 1 GB: {ways.UNSCALE_TORCH} / ours", "unscale, *", least=LARGE),
        under_torchs(best_way, "step, not clipped; *", bar=1.16, least=LARGE),
    ]
