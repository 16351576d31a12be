"""Measures candidates for the Triton engine's tuning table and writes the rows that gain something.

The oracle judges every candidate first, then all take turns. The best of fifty medians is partly luck, so the fastest
few run once more beside the default alone, and that is where a row's gain comes from.
"""

from __future__ import annotations

import datetime
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.contenders import OURS, Contender, fusedclip_contender
from benchmarks.floor import readers
from benchmarks.measure import Settings, Subject, entry, fastest_reader, judge
from benchmarks.operations import Operation
from benchmarks.results import Measurement
from benchmarks.table import duration, markdown, short
from benchmarks.timing import Budget, Entry, clock_for, flusher, quantiles_us, take_turns
from fusedclip.backends import triton
from fusedclip.backends.triton import tuning
from fusedclip.backends.triton.tuning import Row, Tuning

PACKAGED = tuning.TABLE
KIB = 1024
TILES, STEPS = (32 * KIB, 64 * KIB, 128 * KIB), (8 * KIB, 16 * KIB, 32 * KIB)
WARPS, PROGRAMS = (4, 8), (2, 4, 5, 8)
FINALISTS = 3
LEAST_GAIN = 1.02  # medians of two runs of the same code differ by about 1 %
OPERATIONS = (Operation.NOT_CLIPPED, Operation.CLIPPED)  # one pass of reading; that, and a pass of writing
WORKLOADS = {"cuda": "llama3-8b-shard", "cpu": "host-10x256"}
LEAST_GIB = 1.25  # whole layers of that model that fit are more than 1 GiB; the benchmark takes four times as much
SECONDS = {"cuda": 30.0, "cpu": 1.0}
MOST_REGISTERS = 255  # that an NVIDIA thread can have
# Registers of 32 bits, and threads per warp: of a multiprocessor since 2012, of a compute unit of an MI300.
NVIDIA_ROOM, AMD_ROOM = (65_536, 32), (131_072, 64)


@dataclass
class Candidate:
    """A tuning, why it is out of the race if it is, and the medians of its calls in microseconds."""

    tuning: Tuning
    failure: str = ""
    times: dict[Operation, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Microseconds for a call that only reads and a call that clips."""
        return sum(self.times.values()) if self.times else math.inf

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

        return Contender(f"{OURS} {self.name}", {operation: ours.calls[operation] for operation in OPERATIONS}, context)


@dataclass(frozen=True)
class Race:
    """What candidates are timed on, and for how long."""

    subject: Subject
    settings: Settings
    seconds: float

    def judge(self, candidate: Candidate) -> None:
        for operation in OPERATIONS:
            limit = operation.limit(self.subject.right.norm)
            verdict = judge(candidate.contender, operation, limit, self.subject)
            candidate.failure = candidate.failure or verdict.failure

    def run(self, candidates: Sequence[Candidate], seed: int) -> Measurement:
        """Times those that have not failed, and returns the read floor of the same minutes."""
        gradients, device = self.subject.gradients, self.settings.device
        flush = flusher(device, gradients.nbytes)
        entries = readers(gradients.memory, before=flush)
        timed = {(c.name, o): c for c in candidates if not c.failure for o in OPERATIONS}
        entries += [self._entry(candidate, operation, flush) for (_, operation), candidate in timed.items()]
        samples = take_turns(entries, clock_for(device), Budget(self.seconds, most=self.settings.most_rounds), seed)
        for (name, operation), candidate in timed.items():
            candidate.times[operation] = quantiles_us(samples[f"{name}: {operation.value}"].device)[1]
        return fastest_reader(samples, gradients.nbytes)

    def _entry(self, candidate: Candidate, operation: Operation, flush: Callable[[], object]) -> Entry:
        limit = operation.limit(self.subject.right.norm)
        one = entry(candidate.contender, operation, limit, self.subject.gradients, flush)
        return replace(one, name=f"{candidate.name}: {operation.value}")


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


def check_serves(device: torch.device) -> None:
    engine = triton.Triton()
    reason = engine.missing() or engine.refuses(device, {torch.float32})
    if device.type not in WORKLOADS:
        reason = f"the benchmarks have no clock for {device.type}"
    if reason:
        way_out = "Give --device cuda, or try the command out on the CPU with TRITON_INTERPRET=1"
        raise ValueError(f"the Triton engine cannot be tuned on {device}: {reason}. {way_out}")


def tunings(device: torch.device, known: Sequence[Tuning] = (), *, quick: bool = False) -> list[Tuning]:
    """The default, those already known, and all that is worth a try: fewer than the engine caches tables of.

    `quick`: only those with the default's tiles, whose size should matter least.
    """
    default = tuning.default_for(device)
    if device.type == "cpu":
        others = [replace(default, programs_per_processor=1)]
    else:
        others = [
            *(fitting(*NVIDIA_ROOM, limit=True) if torch.version.hip is None else fitting(*AMD_ROOM, limit=False))
        ]
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


def tune(dtype: str, settings: Settings, quick: bool, known: Sequence[Tuning], progress: Callable[[], Any]) -> Result:
    device = settings.device
    subject = Subject.make(WORKLOADS[device.type], dtype, settings)
    race = Race(subject, settings, SECONDS[device.type] / (3 if quick else 1))
    candidates = [Candidate(one) for one in tunings(device, known, quick=quick)]
    for candidate in candidates:
        race.judge(candidate)
        progress()
    floor = race.run(candidates, settings.seed)
    row = None if candidates[0].failure else final(race, candidates, dtype)
    return Result(dtype, candidates, floor, subject.gradients.nbytes, row)


def final(race: Race, candidates: Sequence[Candidate], dtype: str) -> Row | None:
    """The fastest of the best few against the default (the first candidate), if it gains more than noise does."""
    default = Candidate(candidates[0].tuning)
    ranking = sorted((one for one in candidates[1:] if not one.failure), key=lambda one: one.score)
    finalists = [Candidate(one.tuning) for one in ranking[:FINALISTS]]
    race.run([default, *finalists], race.settings.seed + 1)
    best = min([default, *finalists], key=lambda one: one.score)
    gain = round(default.score / best.score, 3)
    return row_of(best.tuning, dtype, gain, race.settings.device) if gain > LEAST_GAIN else None


def row_of(fastest: Tuning, dtype: str, gain: float, device: torch.device) -> Row:
    version: str = importlib.import_module("triton").__version__
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    architecture = tuning.architecture_of(device)
    return Row(architecture, dtype, fastest, gain, environment.device_name(device), version, date)


def known_rows(path: Path, device: torch.device) -> dict[str, Row]:
    """By dtype, the rows that stand in the file for this device's architecture."""
    architecture = tuning.architecture_of(device)
    rows = tuning.read_rows(path) if path.exists() else []
    return {row.dtype: row for row in rows if row.architecture == architecture}


def write(path: Path, device: torch.device, results: Sequence[Result]) -> None:
    """Replaces the rows of what was measured: a row that no longer gains anything goes."""
    measured = {(tuning.architecture_of(device), result.dtype) for result in results}
    old = tuning.read_rows(path) if path.exists() else []
    kept = [row for row in old if row.key not in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    tuning.write_rows(path, kept + [result.row for result in results if result.row])


def table(result: Result) -> str:
    """Every candidate, the fastest first; the default is marked, and those that failed say why."""
    default = result.candidates[0]
    header = [result.dtype, *(operation.value for operation in OPERATIONS), "GB/s", "of read floor", "gain"]
    rows = []
    for one in sorted(result.candidates, key=lambda one: one.score):
        name = f"**{one.name}** (default)" if one is default else one.name
        read = None if one.failure else one.times[Operation.NOT_CLIPPED]
        rows.append(
            [
                f"{name}: FAILED, {one.failure}" if one.failure else name,
                *(duration(one.times.get(operation)) for operation in OPERATIONS),
                short(read and result.nbytes / read / 1e3, ".1f"),
                short(read and (result.floor.p50_us or 0.0) / read, ".0%"),
                short(None if one.failure or default.failure else default.score / one.score, ".3f", "x"),
            ]
        )
    return markdown(header, rows)


def verdict(result: Result) -> str:
    if not result.default_is_right:
        return f"{result.dtype}: no row, the default is wrong: {result.candidates[0].failure}"
    if result.row is None:
        return f"{result.dtype}: no row, nothing gained more than {LEAST_GAIN - 1:.0%} in the final"
    return f"{result.dtype}: {Candidate(result.row.tuning).name} gained {result.row.gain:.3f}x in the final"
