"""Contenders take turns; every call is timed by itself and the quantiles of all calls are kept."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

# Read between two calls, so that no call starts on what its predecessor left in the cache (dirty lines that it would
# have to write back, or gradients that it would not have to read). On the CPU, workloads of a few MB stay warm: they
# are in the cache after a backward pass as well.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
FLUSH_FROM = {"cpu": 16 << 20, "cuda": 0}


@dataclass
class Entry:
    """One that takes its turn: what is timed, and what has to happen before without being timed."""

    name: str
    call: Callable[[], object]
    before: Callable[[], object] = field(default=lambda: None)
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Times:
    """Nanoseconds of a call: until its work was done, until it returned, and of the device's work alone."""

    wall: float
    host: float
    device: float


@dataclass
class Samples:
    """The times of every call of one entry; on the CPU all three are the same."""

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def add(self, times: Times) -> None:
        self.wall.append(times.wall)
        self.host.append(times.host)
        self.device.append(times.device)


@dataclass(frozen=True)
class Budget:
    """When to stop: after `seconds`, but not before `least` and not after `most` rounds.

    An entry that has used half of the seconds by itself sits out from its fourth turn on: a contender 50 times slower
    than the others would leave those few rounds.
    """

    seconds: float
    least: int = 7
    most: int = 2000

    def exhausted_by(self, samples: Samples) -> bool:
        return len(samples.wall) >= 3 and sum(samples.wall) > self.seconds / 2 * 1e9


class Clock(Protocol):
    """Times one turn of an entry."""

    def __call__(self, entry: Entry) -> Times: ...


def cpu_clock(entry: Entry) -> Times:
    entry.before()
    with entry.context():
        start = time.perf_counter_ns()
        entry.call()
        spent = time.perf_counter_ns() - start
    return Times(spent, spent, spent)


def cuda_clock(entry: Entry) -> Times:
    """Two calls. On an idle stream: the wall time holds the launches' latency, as a program that waits sees it. Then
    behind a stream that is kept busy until the host is through: the device's time alone, as a training step sees it,
    whose host runs ahead.
    """
    wall, host = _between_events(entry)
    return Times(wall, host, _between_events(entry, busy_for=host)[0])


CYCLES_PER_NS = 2.5  # more than any GPU's clock: being busy for too long costs nothing but time
HEAD_START_NS = 20_000


def _between_events(entry: Entry, busy_for: float | None = None) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    end.record()  # an event is created when it is first recorded: not between the two
    entry.before()
    with entry.context():
        torch.cuda.synchronize()
        if busy_for is not None:
            torch.cuda._sleep(int(CYCLES_PER_NS * (busy_for + HEAD_START_NS)))  # type: ignore[no-untyped-call]
        begin.record()
        start = time.perf_counter_ns()
        entry.call()
        host = time.perf_counter_ns() - start
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e6, host


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


def flusher(device: torch.device, workload_bytes: int) -> Callable[[], object]:
    """A function that clears the cache of other data, or does nothing if the workload is small."""
    if workload_bytes < FLUSH_FROM[device.type]:
        return lambda: None
    scratch = torch.ones(FLUSH_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    return scratch.sum


def take_turns(
    entries: Sequence[Entry], clock: Clock, budget: Budget, seed: int, progress: Callable[[], object] = lambda: None
) -> dict[str, Samples]:
    """Time all entries round by round, each round in a random order, so that drift and predecessors even out."""
    shuffle = random.Random(seed).shuffle
    samples = {entry.name: Samples() for entry in entries}
    order = list(entries)
    gc.collect()
    deadline = time.perf_counter() + budget.seconds
    gc.disable()  # as timeit does: a collection would fall on whoever is next
    try:
        for done in range(budget.most):
            if done >= budget.least and time.perf_counter() > deadline:
                break
            shuffle(order)
            for entry in order:
                if budget.exhausted_by(samples[entry.name]):
                    continue
                samples[entry.name].add(clock(entry))
            progress()
    finally:
        gc.enable()
    return samples


def quantiles_us(nanoseconds: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 in microseconds."""
    low, middle, high = np.quantile(nanoseconds, (0.2, 0.5, 0.8)) / 1e3
    return float(low), float(middle), float(high)
