"""Measures candidates for the Triton engine's tuning table and writes the rows that gain something.

The oracle judges every candidate first, then all take turns. The best of fifty medians is partly luck, so the fastest
few run once more beside the default alone, and that is where a row's gain comes from.
"""

import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.contenders import OURS, Contender, fusedclip_contender
from benchmarks.measure import Settings, Subject, entry, judge, time_beside_floor
from benchmarks.results import Measurement
from benchmarks.suites import BOTH
from benchmarks.table import duration, markdown, short
from fusedclip.backends import triton
from fusedclip.backends.triton import tuning
from fusedclip.backends.triton.tuning import Row, Tuning

KIB = 1024
TILES, STEPS = (32 * KIB, 64 * KIB, 128 * KIB), (8 * KIB, 16 * KIB, 32 * KIB)
WARPS, PROGRAMS = (4, 8), (2, 4, 5, 8)
FINALISTS = 3
LEAST_GAIN = 1.02  # medians of two runs of the same code differ by about 1 %
WORKLOADS = {"cuda": "llama3-8b-shard", "cpu": "host-10x256"}
LEAST_GIB = 1.25  # whole layers of that model that fit are more than 1 GiB; the benchmark takes four times as much
SECONDS = {"cuda": 30.0, "cpu": 1.0}
MOST_REGISTERS = 255  # that an NVIDIA thread can have
# Registers of 32 bits, and threads per warp: of a multiprocessor since 2012, of a compute unit of an MI300.
NVIDIA_ROOM, AMD_ROOM = (65_536, 32), (131_072, 64)


@dataclass
class Candidate:
    """A tuning, why it is out of the race if it is, and its calls' medians in us: not clipped, clipped."""

    tuning: Tuning
    failure: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Microseconds for a call that only reads and a call that clips."""
        return sum(self.times) if self.times else math.inf

    @property
    def name(self) -> str:
        of = self.tuning
        limits = "".join(f", {name} {value}" for name, value in of.limits)
        size = f"{of.tile_bytes // KIB} KiB in steps of {of.step_bytes // KIB}"
        return f"{size}, {of.num_warps} warps, {of.programs_per_processor} programs{limits}"

    @property
    def contender(self) -> Contender:
        ours = fusedclip_contender("triton")

        @contextmanager
        def context() -> Iterator[None]:
            with ours.context(), tuning.use(self.tuning):
                yield

        return Contender(f"{OURS} {self.name}", ours.calls, context=context)


@dataclass(frozen=True)
class Result:
    """Of one dtype: everyone's first times, the default at their head, and the row to write if something is faster."""

    dtype: str
    candidates: list[Candidate]
    floor: Measurement
    nbytes: int
    row: Row | None

    @property
    def default_is_right(self) -> bool:
        return not self.candidates[0].failure


def file_for(device: torch.device, out: Path | None) -> Path:
    """Where the rows go, if this device can be tuned."""
    engine = triton.Triton()
    reason = engine.missing() or engine.refuses(device, {torch.float32})
    if device.type not in WORKLOADS:
        reason = f"the benchmarks have no clock for {device.type}"
    if reason:
        way_out = "Give --device cuda, or try the command out on the CPU with TRITON_INTERPRET=1"
        raise ValueError(f"the Triton engine cannot be tuned on {device}: {reason}. {way_out}")
    if device.type == "cpu" and not out:
        raise ValueError("an interpreter's times must not get into the package: give --out FILE.json")
    return out or tuning.TABLE


def tune_all(dtypes: Iterable[str], settings: Settings, quick: bool, path: Path, bar: Any) -> list[Result]:
    """Tune each, and write what was found where the default is right; `bar` shows the progress."""
    rows, results = rows_in(path), []
    for dtype in dtypes:
        bar.set_description(dtype)
        key = tuning.architecture_of(settings.device), dtype
        results.append(tune(dtype, settings, quick, [row.tuning for row in rows if row.key == key], bar.update))
    write(path, settings.device, [result for result in results if result.default_is_right])
    return results


def tune(dtype: str, settings: Settings, quick: bool, known: Sequence[Tuning], progress: Callable[[], Any]) -> Result:
    device = settings.device
    subject, seconds = Subject.make(WORKLOADS[device.type], dtype, settings), SECONDS[device.type] / (3 if quick else 1)
    candidates = [Candidate(one) for one in tunings(device, known, quick=quick)]
    for candidate in candidates:
        verdicts = [judge(candidate.contender, operation, subject).failure for operation in BOTH]
        candidate.failure = next(filter(None, verdicts), "")
        progress()
    floor, row = race(candidates, subject, settings, seconds), None
    default, *others = candidates
    if not default.failure:
        ranking = sorted((one for one in others if not one.failure), key=lambda one: one.score)
        finalists = [Candidate(one.tuning) for one in (default, *ranking[:FINALISTS])]
        race(finalists, subject, replace(settings, seed=settings.seed + 1), seconds)
        best = min(finalists, key=lambda one: one.score)
        gain = round(finalists[0].score / best.score, 3)
        row = row_of(best.tuning, dtype, gain, device) if gain > LEAST_GAIN else None
    return Result(dtype, candidates, floor, subject.gradients.nbytes, row)


def race(candidates: Sequence[Candidate], subject: Subject, settings: Settings, seconds: float) -> Measurement:
    """Times those that have not failed, and returns the read floor of the same minutes."""
    entries = {
        (index, operation): replace(entry(one.contender, operation, subject), name=f"{one.name}: {operation.value}")
        for index, one in enumerate(candidates)
        for operation in BOTH
        if not one.failure
    }
    floor, timed = time_beside_floor(list(entries.values()), subject.gradients, settings, seconds)
    for (index, _), one in entries.items():
        candidates[index].times.append(timed[one.name].device_us or math.inf)
    return floor


def tunings(device: torch.device, known: Sequence[Tuning] = (), *, quick: bool = False) -> list[Tuning]:
    """The default, those already known, and all that is worth a try: fewer than the engine caches tables of.

    `quick`: only those with the default's tiles, whose size should matter least.
    """
    default = tuning.default_for(device)
    if device.type == "cpu":
        others = [replace(default, programs_per_processor=1)]
    elif torch.version.hip is None:
        others = list(fitting(*NVIDIA_ROOM, limit=True))
    else:
        others = list(fitting(*AMD_ROOM, limit=False))
    if quick:
        others = [one for one in others if one.tile_bytes == default.tile_bytes]
    return list(dict.fromkeys([default, *known, *others]))


def fitting(registers: int, warp: int, *, limit: bool) -> Iterator[Tuning]:
    """Those whose programs can all be resident, with the compiler held to it where it can be (`limit`)."""
    for tile, step, warps, programs in product(TILES, STEPS, WARPS, PROGRAMS):
        threads = warps * warp
        room = min(registers // (programs * threads) // 8 * 8, MOST_REGISTERS)
        # A step in flight, as many accumulators, and some 32 for addresses and the like. On sm_90 the tightest (fp32,
        # 48 or 64 registers) then spill 16 to 24 bytes: whether that costs anything, the clock may say.
        if room >= 2 * step // threads // 4 + 32:
            yield Tuning(tile, step, warps, programs, (("maxnreg", room),) if limit else ())


def row_of(fastest: Tuning, dtype: str, gain: float, device: torch.device) -> Row:
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    names = environment.device_name(device), environment.version("triton")
    return Row(tuning.architecture_of(device), dtype, fastest, gain, *names, date)


def rows_in(path: Path) -> list[Row]:
    return tuning.read_rows(path) if path.exists() else []


def write(path: Path, device: torch.device, results: Sequence[Result]) -> None:
    """Replaces the rows of what was measured: a row that no longer gains anything goes."""
    measured = {(tuning.architecture_of(device), result.dtype) for result in results}
    kept = [row for row in rows_in(path) if row.key not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    tuning.write_rows(path, kept + [result.row for result in results if result.row])


def table(result: Result) -> str:
    """Every candidate, the fastest first; the default is marked, and those that failed say why."""
    default, rows = result.candidates[0], []
    for one in sorted(result.candidates, key=lambda one: one.score):
        name = f"**{one.name}** (default)" if one is default else one.name
        if one.failure:
            rows.append([f"{name}: FAILED, {one.failure}", *["-"] * 5])
            continue
        gain = None if default.failure else default.score / one.score
        rates = [f"{result.nbytes / one.times[0] / 1e3:.1f}", f"{(result.floor.p50_us or 0.0) / one.times[0]:.0%}"]
        rows.append([name, *map(duration, one.times), *rates, short(gain, ".3f", "x")])
    return markdown([result.dtype, *(one.value for one in BOTH), "GB/s", "of read floor", "gain"], rows)


def verdict(result: Result) -> str:
    if not result.default_is_right:
        return f"{result.dtype}: no row, the default is wrong: {result.candidates[0].failure}"
    if result.row is None:
        return f"{result.dtype}: no row, nothing gained more than {LEAST_GAIN - 1:.0%} in the final"
    return f"{result.dtype}: {Candidate(result.row.tuning).name} gained {result.row.gain:.3f}x in the final"
