"""Measures candidates for the Triton engine's tuning table and writes the rows that gain something.

The oracle judges every candidate first, then all take turns. The best of fifty medians is partly luck, so the fastest
few run once more beside the default alone, and that is where a row's gain comes from.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import environment
from benchmarks.contenders import OURS, Contender, fusedclip_contender
from benchmarks.measure import Settings, gradients_like, judge, measure
from benchmarks.oracle import Oracle
from benchmarks.results import Measurement
from benchmarks.suites import BOTH, Suite
from benchmarks.table import MISSING, duration, markdown, short
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


@dataclass(frozen=True)
class Candidate:
    """A tuning, and its calls where nothing is clipped and where it is."""

    tuning: Tuning
    not_clipped: Measurement
    clipped: Measurement

    @property
    def failure(self) -> str:
        return self.not_clipped.failure or self.clipped.failure

    @property
    def score(self) -> float:
        """Microseconds for a call that only reads and a call that clips."""
        return inf if self.failure else self.not_clipped.device_us + self.clipped.device_us


class Result(NamedTuple):
    """Of an architecture and a dtype: everyone's first times, the default at their head, the row to write if something
    is faster, and what is to be said.
    """

    key: tuple[str, str]
    candidates: Sequence[Candidate]
    row: Row | None
    verdict: str


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
    rows, results = tuning.read_rows(path) if path.exists() else [], []
    for dtype in dtypes:
        bar.set_description(dtype)
        known = [row.tuning for row in rows if row.key == (tuning.architecture_of(settings.device), dtype)]
        results.append(tune(dtype, settings, quick, known, bar.update))
    write(path, rows, results)
    return results


def tune(dtype: str, settings: Settings, quick: bool, known: Sequence[Tuning], progress: Callable[[], Any]) -> Result:
    device = settings.device
    key = tuning.architecture_of(device), dtype
    right, seconds = Oracle(gradients_like(WORKLOADS[device.type], dtype, settings)), SECONDS[device.type]
    seconds /= 3 if quick else 1
    judged = tunings(device, known, quick=quick)
    for one in judged:  # compiles its kernels
        for operation in BOTH:
            judge(contender(one), operation, right)
        progress()
    default, *others = candidates = race(judged, right, settings, seconds)
    if default.failure:
        return Result(key, candidates, None, f"no row, the default is wrong: {default.failure}")
    ranking = sorted(others, key=lambda one: one.score)[:FINALISTS]
    finalists = [default.tuning, *(one.tuning for one in ranking if not one.failure)]
    final = race(finalists, right, replace(settings, seed=settings.seed + 1), seconds)
    best = min(final, key=lambda one: one.score)
    gain, date = round(final[0].score / best.score, 3), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    if gain <= LEAST_GAIN:
        return Result(key, candidates, None, f"no row, nothing gained more than {LEAST_GAIN - 1:.0%} in the final")
    row = Row(*key, best.tuning, gain, environment.device_name(device), environment.version("triton"), date)
    return Result(key, candidates, row, f"{name_of(best.tuning)} gained {gain:.3f}x in the final")


def race(among: Sequence[Tuning], right: Oracle, settings: Settings, seconds: float) -> list[Candidate]:
    settings, suite = replace(settings, contenders=[contender(one) for one in among]), Suite((), seconds / len(BOTH))
    rows = [measure(operation, right, settings, suite) for operation in BOTH]
    return [Candidate(*one) for one in zip(among, *(row.contenders for row in rows), strict=True)]


def contender(candidate: Tuning) -> Contender:
    ours = fusedclip_contender("triton")

    @contextmanager
    def context() -> Iterator[None]:
        with ours.context(), tuning.use(candidate):
            yield

    return Contender(f"{OURS} {name_of(candidate)}", ours.calls, ours.passes, context)


def name_of(candidate: Tuning) -> str:
    limits = "".join(f", {name} {value}" for name, value in candidate.limits)
    size = f"{candidate.tile_bytes // KIB} KiB in steps of {candidate.step_bytes // KIB}"
    return f"{size}, {candidate.num_warps} warps, {candidate.programs_per_processor} programs{limits}"


def tunings(device: torch.device, known: Sequence[Tuning] = (), *, quick: bool = False) -> list[Tuning]:
    """The default, those already known, and all that is worth a try: fewer than the engine caches tables of.

    `quick`: only those with the default's tiles, whose size should matter least.
    """
    default = tuning.default_for(device)
    others = [replace(default, programs_per_processor=1)] if device.type == "cpu" else fitting()
    tiles = {default.tile_bytes} if quick else TILES
    return list(dict.fromkeys([default, *known, *(one for one in others if one.tile_bytes in tiles)]))


def fitting() -> Iterator[Tuning]:
    """Those whose programs can all be resident, with the compiler held to it where it can be."""
    limit = torch.version.hip is None
    registers, warp = NVIDIA_ROOM if limit else AMD_ROOM
    for tile, step, warps, programs in product(TILES, STEPS, WARPS, PROGRAMS):
        threads = warps * warp
        room = min(registers // (programs * threads) // 8 * 8, MOST_REGISTERS)
        # A step in flight, as many accumulators, and some 32 for addresses and the like. On sm_90 the tightest (fp32,
        # 48 or 64 registers) then spill 16 to 24 bytes: whether that costs anything, the clock may say.
        if room >= 2 * step // threads // 4 + 32:
            yield Tuning(tile, step, warps, programs, (("maxnreg", room),) if limit else ())


def write(path: Path, rows: Iterable[Row], results: Sequence[Result]) -> None:
    """Replaces the rows of what was measured: one that no longer gains anything goes, where the default is right."""
    measured = {result.key for result in results if not result.candidates[0].failure}
    kept = [row for row in rows if row.key not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    tuning.write_rows(path, kept + [result.row for result in results if result.row])


def table(result: Result) -> str:
    """Every candidate, the fastest first; the default is marked, and those that failed say why."""
    default, rows = result.candidates[0], []
    for one in sorted(result.candidates, key=lambda one: one.score):
        name = f"**{name_of(one.tuning)}** (default)" if one is default else name_of(one.tuning)
        times = [duration(each.device_us) for each in (one.not_clipped, one.clipped)]
        rates = [short(one.not_clipped.gb_per_s, ".1f"), short(one.not_clipped.floor_fraction, ".0%")]
        gain = nan if default.failure else default.score / one.score
        row = [name, *times, *rates, short(gain, ".3f", "x")]
        rows.append([f"{name}: FAILED, {one.failure}", *[MISSING] * 5] if one.failure else row)
    return markdown([result.key[1], *(one.value for one in BOTH), "GB/s", "of read floor", "gain"], rows)
