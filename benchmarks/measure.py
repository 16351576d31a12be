"""From a case to a row: fill the workload, let the oracle judge, time what passed beside the read floor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from math import nan

import numpy as np
import torch
from torch import Tensor

from benchmarks import floors, workloads
from benchmarks.contenders import OURS, TORCH_FOREACH, Contender
from benchmarks.gradients import Gradients, dtypes_of
from benchmarks.oracle import Oracle, Verdict
from benchmarks.results import Measurement, Row
from benchmarks.suites import Case, Operation, Suite
from benchmarks.timing import Budget, Entry, Times, flusher, nothing, take_turns


@dataclass(frozen=True)
class Settings:
    """What all rows of a run have in common."""

    device: torch.device
    contenders: Sequence[Contender] = ()
    memory: int = workloads.GIB
    seed: int = 0
    most_rounds: int = 2000


def gradients_like(name: str, dtype: str, settings: Settings) -> Gradients:
    """Of the workload of that name, as far as the memory goes."""
    workload = workloads.load(name, max(one.itemsize for one in dtypes_of(dtype)), settings.memory)
    return Gradients(workload, dtype, settings.device, settings.seed)


def run_suite(suite: Suite, settings: Settings, progress: Callable[[Case], object]) -> Iterator[Row]:
    """The suite's rows, one after another; `progress` is called before each with its case."""
    for (name, dtype), cases in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
        right = None
        for case in cases:
            progress(case)
            right = right or Oracle(gradients_like(name, dtype, settings))
            yield measure(case.operation, right, settings, suite)


def measure(operation: Operation, right: Oracle, settings: Settings, suite: Suite) -> Row:
    taking_part = [one for one in settings.contenders if operation in one.calls and one.name not in suite.without]
    verdicts = {one.name: judge(one, operation, right) for one in taking_part}
    entries = [entry(one, operation, right) for one in taking_part if not verdicts[one.name].failure]
    row = row_of(operation.value, entries, right.gradients, settings, suite.seconds_per_row)
    row.contenders = [replace(row.find(name), **asdict(one)) for name, one in verdicts.items()]
    for one in row.contenders:
        one.ratio_to_foreach = row.find(TORCH_FOREACH).p50_us / one.p50_us
    return row


def judge(contender: Contender, operation: Operation, right: Oracle) -> Verdict:
    """One call against the oracle; it also warms the contender up. Gradients have their first values afterwards."""
    gradients, limit = right.gradients, operation.limit(right.norm)
    gradients.restore()
    try:
        with contender.context():
            result = contender.calls[operation](gradients.parameters, limit)
        return right.judge(operation, limit, result, contender.name.startswith(OURS))
    except Exception as problem:  # whatever a contender raises belongs into its row, the others go on
        return Verdict(failure=f"{type(problem).__name__}: {problem}")
    finally:
        gradients.restore()


def entry(contender: Contender, operation: Operation, right: Oracle) -> Entry:
    call = partial(contender.calls[operation], right.gradients.parameters, operation.limit(right.norm))
    before = right.gradients.restore if operation.writes else nothing
    return Entry(contender.name, call, before, contender.context, contender.passes.get(operation, nan))


def row_of(operation: str, entries: Sequence[Entry], gradients: Gradients, settings: Settings, seconds: float) -> Row:
    """The times of the entries and of the floor, all taken in turns. Where clipping is all that is done, the floor on a
    CPU is reading once and, after that, changing in place.
    """
    writes = operation == Operation.CLIPPED.value
    passes = [readers(gradients.memory), floors.loops(gradients.memory, stores=True) if writes else []]
    everyone = [*passes[0], *passes[1], *entries]
    budget = Budget(seconds, most=settings.most_rounds)
    measured = race(everyone, gradients.nbytes, settings.device, budget, settings.seed)
    best = [min((measured.pop(one.name) for one in each), key=lambda one: one.device_us) for each in passes if each]
    floor = best[0] if len(best) == 1 else one_after_another(*best)
    for one in measured.values():
        one.floor_fraction = floor.device_us / one.device_us
    work = gradients.workload
    size, on = (len(work.shapes), work.elements, gradients.nbytes), (settings.device.type, torch.get_num_threads())
    what = gradients.dtype, operation
    return Row(work.name, work.title, work.cut, *size, *what, *on, floor, list(measured.values()))


def race(
    entries: Sequence[Entry], nbytes: int, device: torch.device, budget: Budget, seed: int
) -> dict[str, Measurement]:
    """By name what each of them took in turns for so many bytes of gradients."""
    samples = take_turns(entries, device, budget, seed, flusher(device, nbytes))
    return {one.name: measurement(one, samples[one.name], nbytes) for one in entries}


def readers(memory: Tensor) -> list[Entry]:
    """Plain sums over `memory` (bytes), read as fp32 and as int64, and on a CPU the best of a family of plain loops: no
    call can be faster than reading its bytes. The floor of a row is the fastest.
    """
    whole = memory[: memory.numel() // 8 * 8]
    names = {"float32": torch.float32, "int64": torch.int64}
    sums = [Entry(f"read floor: sum of {name}", whole.view(dtype).sum, passes=1) for name, dtype in names.items()]
    return sums + floors.loops(memory, stores=False)


def one_after_another(read: Measurement, write: Measurement) -> Measurement:
    """Two floors as that of a call which does both."""
    both = Measurement(f"{read.contender}; {write.contender}", samples=read.samples)
    for name in ("p20_us", "p50_us", "p80_us", "host_us", "device_us", "bytes_moved"):
        setattr(both, name, getattr(read, name) + getattr(write, name))
    both.gb_per_s = both.bytes_moved / both.device_us / 1e3
    return both


def measurement(entry: Entry, samples: Sequence[Times], nbytes: int) -> Measurement:
    (p20, *_), (p50, host, device), (p80, *_) = (np.quantile(samples, (0.2, 0.5, 0.8), axis=0) / 1e3).tolist()
    moved = entry.passes * nbytes
    known = {"samples": len(samples), "bytes_moved": moved, "gb_per_s": moved / device / 1e3}
    return Measurement(entry.name, p20_us=p20, p50_us=p50, p80_us=p80, host_us=host, device_us=device, **known)
