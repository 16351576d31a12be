"""From a case to a row: fill the workload, let the oracle judge, time what passed beside the read floor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from math import nan

import torch
from torch import Tensor

from benchmarks import oracle, workloads
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
    row.floor, timed = time_beside_floor(entries, subject.gradients, settings, suite.seconds_per_row)
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
    entries: Sequence[Entry], gradients: Gradients, settings: Settings, seconds: float
) -> tuple[Measurement, dict[str, Measurement]]:
    """The read floor, and by name the times of each entry, all taken in turns."""
    nbytes, device = gradients.nbytes, settings.device
    floors = readers(gradients.memory)
    budget = Budget(seconds, most=settings.most_rounds)
    samples = take_turns([*floors, *entries], device, budget, settings.seed, flusher(device, nbytes))
    measured = {one.name: measurement(one, samples[one.name], nbytes) for one in [*floors, *entries]}
    floor = min((measured.pop(one.name) for one in floors), key=lambda one: one.device_us)
    for one in measured.values():
        one.floor_fraction = floor.device_us / one.device_us
    return floor, measured


def readers(memory: Tensor) -> list[Entry]:
    """Plain sums over `memory` (bytes), read as fp32 and as int64: no call can be faster than reading its bytes.

    Of all reductions in torch 2.13 these two read fastest on a CPU (int64 79 to 85 GB/s, fp32 51 to 80 on the machine
    of the first measurements; dot 66, amax 69). The floor of a row is the faster one.
    """
    whole = memory[: memory.numel() // 8 * 8]
    names = {"float32": torch.float32, "int64": torch.int64}
    return [Entry(f"read floor: sum of {name}", whole.view(dtype).sum, passes=1) for name, dtype in names.items()]


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
