"""From a case to a row: fill the workload, let the oracle judge, time what passed beside the read floor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from math import nan

import torch
from torch import Tensor

from benchmarks import floors, oracle, workloads
from benchmarks.contenders import TORCH_FOREACH, Contender
from benchmarks.gradients import Gradients, dtypes_of
from benchmarks.operations import Operation
from benchmarks.results import Measurement, Row
from benchmarks.suites import Case, Suite
from benchmarks.timing import Budget, Entry, Times, flusher, nothing, quantiles_us, take_turns


@dataclass(frozen=True)
class Settings:
    """What all rows of a run have in common."""

    device: torch.device
    contenders: Sequence[Contender] = ()
    memory: int = workloads.GIB
    seed: int = 0
    most_rounds: int = 2000


@dataclass(frozen=True)
class Subject:
    """Gradients to work on, and the right answers for them."""

    workload: workloads.Workload
    gradients: Gradients
    right: oracle.Oracle

    @classmethod
    def make(cls, name: str, dtype: str, settings: Settings) -> "Subject":
        """`dtype` is a name of torch's, or "mixed"."""
        workload = workloads.load(name, max(one.itemsize for one in dtypes_of(dtype)), settings.memory)
        gradients = Gradients(workload, dtypes_of(dtype), settings.device, settings.seed)
        return cls(workload, gradients, oracle.Oracle.of(gradients.saved))


def run_suite(suite: Suite, settings: Settings, progress: Callable[[Case], object]) -> Iterator[Row]:
    """The suite's rows, one after another; `progress` is called before each with its case."""
    for (name, dtype), cases in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
        subject = None
        for case in cases:
            progress(case)
            subject = subject or Subject.make(name, dtype, settings)
            yield measure(case, subject, settings, suite)


def measure(case: Case, subject: Subject, settings: Settings, suite: Suite) -> Row:
    operation = case.operation
    taking_part = [one for one in settings.contenders if operation in one.calls and one.name not in suite.without]
    verdicts = {one.name: judge(one, operation, subject) for one in taking_part}
    entries = [entry(one, operation, subject) for one in taking_part if not verdicts[one.name].failure]
    row = row_of(case.dtype, operation.value, subject.workload, subject.gradients, settings)
    writes = operation is Operation.CLIPPED
    row.floor, timed = time_beside_floor(entries, subject.gradients, settings, suite.seconds_per_row, writes)
    row.contenders = [replace(timed.get(name) or Measurement(name), **asdict(one)) for name, one in verdicts.items()]
    for one in row.contenders:
        one.ratio_to_foreach = row.find(TORCH_FOREACH).p50_us / one.p50_us
    return row


def judge(contender: Contender, operation: Operation, subject: Subject) -> oracle.Verdict:
    """One call against the oracle; it also warms the contender up. Gradients have their first values afterwards."""
    gradients, limit = subject.gradients, operation.limit(subject.right.norm)
    gradients.restore()
    try:
        with contender.context():
            result = contender.calls[operation](gradients.parameters, limit)
        return subject.right.judge(operation, limit, result, gradients.tensors, contender.ours)
    except Exception as problem:  # whatever a contender raises belongs into its row, the others go on
        return oracle.Verdict(failure=f"{type(problem).__name__}: {problem}")
    finally:
        gradients.restore()


def entry(contender: Contender, operation: Operation, subject: Subject) -> Entry:
    gradients, limit = subject.gradients, operation.limit(subject.right.norm)
    call = partial(contender.calls[operation], gradients.parameters, limit)
    before = gradients.restore if operation.writes else nothing
    return Entry(contender.name, call, before, contender.context, contender.passes.get(operation, nan))


def time_beside_floor(
    entries: Sequence[Entry], gradients: Gradients, settings: Settings, seconds: float, writes: bool = False
) -> tuple[Measurement, dict[str, Measurement]]:
    """The floor, and by name the times of each entry, all taken in turns. If a call `writes` on the CPU, its floor is
    reading once and, after that, changing in place."""
    nbytes, device = gradients.nbytes, settings.device
    passes = [readers(gradients.memory), floors.loops(gradients.memory, stores=True) if writes else []]
    family = [*passes[0], *passes[1]]
    budget = Budget(seconds, most=settings.most_rounds)
    samples = take_turns([*family, *entries], device, budget, settings.seed, flusher(device, nbytes))
    measured = {one.name: measurement(one, samples[one.name], nbytes) for one in [*family, *entries]}
    best = [min((measured.pop(one.name) for one in each), key=lambda one: one.device_us) for each in passes if each]
    floor = best[0] if len(best) == 1 else one_after_another(*best)
    for one in measured.values():
        one.floor_fraction = floor.device_us / one.device_us
    return floor, measured


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
    result = Measurement(entry.name, samples=len(samples))
    result.p20_us, result.p50_us, result.p80_us = quantiles_us(one.wall for one in samples)
    result.host_us = quantiles_us(one.host for one in samples)[1]
    result.device_us = quantiles_us(one.device for one in samples)[1]
    result.bytes_moved = entry.passes * nbytes
    result.gb_per_s = result.bytes_moved / result.device_us / 1e3
    return result


def row_of(dtype: str, operation: str, workload: workloads.Workload, gradients: Gradients, settings: Settings) -> Row:
    """Without any time yet."""
    size = workload.tensors, workload.elements, gradients.nbytes
    on = settings.device.type, torch.get_num_threads()
    return Row(workload.name, workload.title, workload.cut, *size, dtype, operation, *on, Measurement("not measured"))
