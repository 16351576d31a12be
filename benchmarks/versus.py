"""Two installed versions of fusedclip in turns: what became slower, beyond what the same version differs from itself.

Three processes take turns: the old version, the new one, and the old one once more. In each round, in a random order,
each makes a handful of calls, whose median counts, while the others sleep: all three see the same moments of a machine
that is now faster, now slower. All rows are gone through several times, each time with three new processes, since a
process is up to a few percent faster or slower than its twin all its life by where its memory lies. Of this is made:

    ratio   new / old: of each start the median over its rounds, of these the mean; with a 99 % interval, for which
            the starts and each one's rounds are drawn again (bootstrap)
    noise   the same of old / old
    bar     1.02 times the farthest that the noise's interval reaches from 1, upwards or downwards

A row is "SLOWER" if the ratio's whole interval is above the bar, "faster" if it is below 1 / bar, "same" if it is
within both, and "undecided" otherwise: more starts and more seconds would tell.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import odd, suites
from benchmarks.environment import ROOT
from benchmarks.results import Report
from benchmarks.suites import SUITES, Case, Suite
from benchmarks.table import MISSING, SHORT_DTYPE, duration, markdown
from benchmarks.timing import Budget
from benchmarks.workloads import CATALOGUE, GIB

OLD, NEW, AGAIN = SIDES = ("old", "new", "old again")
ALL_SUITES = SUITES | {"odd": odd.SUITE}
TOLERANCE = 1.02
CONFIDENCE, DRAWS = 0.99, 1000
PAUSE = 0.003  # seconds between two turns: the threads of the last one spin for a while before they sleep
Times = list[list[float]]  # of each start, of each round: microseconds


@dataclass(frozen=True)
class Ratio:
    """How many times as long one takes as another, and the interval in which that lies."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, these: Times, those: Times) -> Ratio:
        """these / those, round by round."""
        rounds = [np.divide(one, other) for one, other in zip(these, those, strict=True)]
        generator = np.random.default_rng(0)

        def draw(one: Any) -> float:
            return float(np.median(one[generator.integers(len(one), size=len(one))]))

        starts = generator.integers(len(rounds), size=(DRAWS, len(rounds)))
        means = [np.mean([draw(rounds[start]) for start in drawn]) for drawn in starts]
        low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return cls(float(np.mean([np.median(one) for one in rounds])), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def verdict(ratio: Ratio, noise: Ratio) -> str:
    """As this module's head defines it."""
    bar = TOLERANCE * max(noise.high, 1 / noise.low)
    if ratio.low > bar:
        return "SLOWER"
    if ratio.high < 1 / bar:
        return "faster"
    return "same" if 1 / bar <= ratio.low and ratio.high <= bar else "undecided"


@dataclass
class Row:
    """One case; of each side what failed, and the times of its entries: the call, and an odd one's plain one beside."""

    case: Case
    failures: dict[str, str] = field(default_factory=dict)
    times: dict[str, dict[str, Times]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        known = CATALOGUE.get(self.case.workload)
        title = known.title if known else self.case.workload  # what is odd is its own title
        return f"{title}, {SHORT_DTYPE[self.case.dtype]}, {self.case.operation.value}"

    @property
    def failed(self) -> bool:
        return any(self.failures.values())

    def median(self, side: str, entry: str = "call") -> float:
        """Over all rounds; 0 for an entry that the row does not have."""
        return float(np.median(np.concatenate(self.times[side].get(entry, [[0.0]]))))

    @cached_property
    def ratio(self) -> Ratio:
        return Ratio.of(self.times[NEW]["call"], self.times[OLD]["call"])

    @cached_property
    def noise(self) -> Ratio:
        return Ratio.of(self.times[AGAIN]["call"], self.times[OLD]["call"])

    @property
    def verdict(self) -> str:
        if self.failed:
            return "; ".join(f"FAILED, {side}: {reason}" for side, reason in self.failures.items() if reason)
        return verdict(self.ratio, self.noise)

    @property
    def holds(self) -> bool:
        return not self.failures.get(NEW) and self.verdict != "SLOWER"

    def of_plain(self, side: str) -> float:
        """How many times the plain call it takes, without what the odd gradient costs by itself."""
        return (self.median(side) - self.median(side, "alone")) / self.median(side, "plain")


class Worker:
    """A process of one installation. Without a request it sleeps."""

    def __init__(self, python: Path, settings: dict[str, Any]) -> None:
        self.python = python
        self.package: dict[str, str] = {}
        """What it has imported, once it has said so."""
        # -I: neither this folder nor PYTHONPATH decides which fusedclip it imports.
        command = [str(python), "-I", str(Path(__file__).with_name("versus_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.send(settings)

    def send(self, request: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.python} ended with status {self.process.wait()}; its message is above")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def started(old: Path, new: Path, settings: dict[str, Any]) -> Iterator[dict[str, Worker]]:
    """The three processes; `settings` are the worker's: device, threads (None: torch's), memory in bytes, seed."""
    workers: dict[str, Worker] = {}
    try:
        for side, python in zip(SIDES, (old, new, old), strict=True):
            workers[side] = Worker(python, settings)
        for worker in workers.values():
            worker.package = worker.receive()
        check(workers)
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def check(workers: dict[str, Worker]) -> None:
    """That each process has imported what is installed in its environment, and not this checkout."""
    for side, worker in workers.items():
        if Path(worker.package["file"]).resolve().is_relative_to(ROOT):
            raise ValueError(f"{side} is this checkout; install that version into {worker.python}'s environment")
    old, new = workers[OLD], workers[NEW]
    if old.python != new.python and old.package["file"] == new.package["file"]:
        raise ValueError(f"both environments have one fusedclip, {old.package['file']}")


def compare(
    old: Path, new: Path, suite: Suite, settings: dict[str, Any], starts: int, progress: Callable[[], object]
) -> tuple[dict[str, dict[str, str]], list[Row]]:
    """What the sides are, and the suite's rows; `progress` is called after each of them at every start."""
    rows = [Row(case) for case in suite.cases]
    packages = {}
    for number in range(starts):
        with started(old, new, settings) as workers:
            packages = {side: worker.package for side, worker in workers.items()}
            for row in rows:
                measure(row, workers, Budget(suite.seconds_per_row / starts), settings["seed"] + number)
                progress()
    return packages, rows


def measure(row: Row, workers: dict[str, Worker], budget: Budget, seed: int) -> None:
    """Add one start's rounds to the row, or what failed."""
    if row.failed:
        return
    for worker in workers.values():
        worker.send({"prepare": [row.case.workload, row.case.dtype, row.case.operation.value]})
    row.failures = {side: worker.receive() for side, worker in workers.items()}
    if row.failed:
        return
    shuffle, order = random.Random(seed).shuffle, list(workers)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for number in budget.rounds():
        shuffle(order)
        for side in order:
            time.sleep(PAUSE)
            workers[side].send({"turn": number})
            rounds[side].append(workers[side].receive())
    for side, taken in rounds.items():
        for entry in taken[0]:
            row.times.setdefault(side, {}).setdefault(entry, []).append([one[entry] for one in taken])


def run(report: Report, suite: Suite, options: Any, progress: Callable[[], object]) -> int:
    """The command: its tables printed, the times put into the report; 1 if the new version is slower."""
    settings = {name: getattr(options, name) for name in ("device", "threads", "seed")}
    settings["memory"] = int(options.memory * GIB)
    sides, rows = compare(options.old, options.new, suite, settings, options.starts, progress)
    print(f"{table(rows)}\n\n{origin(sides)}")
    report.versus = as_json(sides, rows)
    return int(not all(row.holds for row in rows))


def select(name: str, wanted: Sequence[str], seconds: float | None, quick: bool) -> Suite:
    """The suite of that name, for these workloads only; `seconds` for a row, or three times the suite's own."""
    suite = suites.select(name, workloads=wanted, among=ALL_SUITES)
    return replace(suite, seconds_per_row=(seconds or len(SIDES) * suite.seconds_per_row) / (3 if quick else 1))


def table(rows: Sequence[Row]) -> str:
    """One line per row. `of plain` is how many times the plain call an odd one takes, see `Row.of_plain`."""
    header = ["gradients", "old", "new", "new / old", "old / old", "verdict", "old of plain", "new of plain"]
    beside_plain = any("plain" in row.times.get(OLD, {}) for row in rows)
    return markdown(header[: 8 if beside_plain else 6], [_line(row, beside_plain) for row in rows])


def _line(row: Row, beside_plain: bool) -> list[str]:
    if row.failed:
        return [row.label, *[MISSING] * 4, row.verdict, *[MISSING] * (2 * beside_plain)]
    times = [duration(row.median(side)) for side in (OLD, NEW)]
    of_plain = [f"{row.of_plain(side):.2f}x" for side in (OLD, NEW)] if beside_plain else []
    return [row.label, *times, str(row.ratio), str(row.noise), row.verdict, *of_plain]


def origin(sides: dict[str, dict[str, str]]) -> str:
    """What each side was."""
    return "\n".join(
        f"{side}: {one['engine']} {one['version']}, torch {one['torch']}, {one['file']}" for side, one in sides.items()
    )


def as_json(sides: dict[str, dict[str, str]], rows: Sequence[Row]) -> dict[str, Any]:
    """The times of every round and what was made of them."""
    made = []
    for row in rows:
        ratios = {} if row.failed else {"ratio": asdict(row.ratio), "noise": asdict(row.noise)}
        made.append(asdict(row) | {"label": row.label, "verdict": row.verdict} | ratios)
    return {"sides": sides, "rows": made}
