"""Contenders take turns; every call is timed by itself and the quantiles of all calls are kept."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import torch

# Read between two calls, so that no call starts on what its predecessor left in the cache (dirty lines that it would
# have to write back, or gradients that it would not have to read). On the CPU, workloads of a few MB stay warm: they
# are in the cache after a backward pass as well.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
FLUSH_FROM = {"cpu": 16 << 20, "cuda": 0}
CYCLES_PER_NS = 2.5  # more than any GPU's clock: being busy for too long costs nothing but time
HEAD_START_NS = 20_000


def nothing() -> None:
    pass


@dataclass
class Entry:
    """One that takes its turn: what is timed, and what has to happen before without being timed.

    `passes`: how often it moves the gradients' bytes, NaN where nobody knows.
    """

    name: str
    call: Callable[[], object]
    before: Callable[[], object] = nothing
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    passes: float = nan


class Times(NamedTuple):
    """Nanoseconds of a call: until its work was done, until it returned, and of the device's work alone.

    On the CPU all three are the same.
    """

    wall: float
    host: float
    device: float


@dataclass(frozen=True)
class Budget:
    """When to stop: after `seconds`, but not before `least` and not after `most` rounds.

    An entry that has used half of the seconds by itself sits out from its fourth turn on: a contender 50 times slower
    than the others would leave those few rounds.
    """

    seconds: float
    least: int = 7
    most: int = 2000

    def exhausted_by(self, samples: Sequence[Times]) -> bool:
        return len(samples) >= 3 and sum(one.wall for one in samples) > self.seconds / 2 * 1e9

    def rounds(self) -> Iterator[int]:
        deadline = time.perf_counter() + self.seconds
        for done in range(self.most):
            if done >= self.least and time.perf_counter() > deadline:
                return
            yield done


def cpu_clock(entry: Entry, flush: Callable[[], object] = nothing) -> Times:
    entry.before()
    flush()
    with entry.context():
        start = time.perf_counter_ns()
        entry.call()
        spent = time.perf_counter_ns() - start
    return Times(spent, spent, spent)


def cuda_clock(entry: Entry, flush: Callable[[], object] = nothing) -> Times:
    """Two calls. On an idle stream: the wall time holds the launches' latency, as a program that waits sees it. Then
    behind a stream that is kept busy until the host is through: the device's time alone, as a training step sees it,
    whose host runs ahead.
    """
    wall, host = _between_events(entry, flush)
    return Times(wall, host, _between_events(entry, flush, busy_for=host)[0])


def _between_events(entry: Entry, flush: Callable[[], object], busy_for: float | None = None) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    end.record()  # an event is created when it is first recorded: not between the two
    entry.before()
    flush()
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


def flusher(device: torch.device, workload_bytes: int) -> Callable[[], object]:
    """A function that clears the cache of other data, or does nothing if the workload is small."""
    if workload_bytes < FLUSH_FROM[device.type]:
        return nothing
    scratch = torch.ones(FLUSH_BYTES[device.type] // 8, dtype=torch.int64, device=device)
    return scratch.sum


def take_turns(
    entries: Sequence[Entry], device: torch.device, budget: Budget, seed: int, flush: Callable[[], object] = nothing
) -> dict[str, list[Times]]:
    """Time all entries round by round, each round in a random order, so that drift and predecessors even out."""
    clock = cuda_clock if device.type == "cuda" else cpu_clock
    sample = random.Random(seed).sample
    samples: dict[str, list[Times]] = {entry.name: [] for entry in entries}
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on whoever is next
    try:
        for _ in budget.rounds():
            for entry in sample(entries, len(entries)):
                if not budget.exhausted_by(samples[entry.name]):
                    samples[entry.name].append(clock(entry, flush))
    finally:
        gc.enable()
    return samples
