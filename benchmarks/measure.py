"""From a case to a row: fill the workload, let the oracle judge, time what passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from benchmarks import oracle, workloads
from benchmarks.contenders import TORCH_FOREACH, Contender
from benchmarks.floor import PREFIX, readers
from benchmarks.gradients import Gradients, dtypes_of
from benchmarks.operations import Operation
from benchmarks.results import Measurement, Row
from benchmarks.suites import Case, Suite
from benchmarks.timing import Budget, Entry, Samples, clock_for, flusher, quantiles_us, take_turns


@dataclass(frozen=True)
class Settings:
    """What all rows of a run have in common."""

    device: torch.device
    contenders: Sequence[Contender]
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
    def make(cls, name: str, dtype: str, settings: Settings) -> Subject:
        """`dtype` is a name of torch's, or "mixed"."""
        workload = workloads.load(name, max(one.itemsize for one in dtypes_of(dtype)), settings.memory)
        gradients = Gradients(workload, dtypes_of(dtype), settings.device, settings.seed)
        return cls(workload, gradients, oracle.Oracle.of(gradients.flats, gradients.sizes))


def run_suite(suite: Suite, settings: Settings, progress: Callable[[Case], object]) -> Iterator[Row]:
    """The suite's rows, one after another; `progress` is called before each with its case."""
    for (name, dtype), cases in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
        subject = None
        for case in cases:
            progress(case)
            subject = subject or Subject.make(name, dtype, settings)
            yield measure(case, subject, settings, suite)


def measure(case: Case, subject: Subject, settings: Settings, suite: Suite) -> Row:
    operation, gradients = case.operation, subject.gradients
    limit = operation.limit(subject.right.norm)
    taking_part = [one for one in settings.contenders if operation in one.calls and one.name not in suite.without]
    verdicts = {one.name: judge(one, operation, limit, subject) for one in taking_part}
    flush = flusher(settings.device, gradients.nbytes)
    entries = readers(gradients.memory, before=flush)
    for contender in taking_part:
        if not verdicts[contender.name].failure:
            entries.append(entry(contender, operation, limit, gradients, flush))
    budget = Budget(suite.seconds_per_row, most=settings.most_rounds)
    samples = take_turns(entries, clock_for(settings.device), budget, settings.seed)

    floor = fastest_reader(samples, gradients.nbytes)
    measurements = []
    for contender in taking_part:
        verdict = verdicts[contender.name]
        result = Measurement(contender.name, verdict.failure, verdict.norm_error, verdict.ulp_error)
        if not verdict.failure:
            add_times(result, samples[contender.name], passes_bytes(contender, operation, gradients), floor)
        measurements.append(result)
    add_ratios(measurements)
    return describe(case, subject, settings, floor, measurements)


def judge(contender: Contender, operation: Operation, limit: float, subject: Subject) -> oracle.Verdict:
    """One call against the oracle; it also warms the contender up. Gradients have their first values afterwards."""
    gradients = subject.gradients
    gradients.restore()
    try:
        with contender.context():
            result = contender.calls[operation](gradients.parameters, limit)
        return subject.right.judge(operation, limit, result, gradients.now(), contender.ours)
    except Exception as problem:  # whatever a contender raises belongs into its row, the others go on
        return oracle.Verdict(float("nan"), float("nan"), f"{type(problem).__name__}: {problem}")
    finally:
        gradients.restore()


def entry(
    contender: Contender, operation: Operation, limit: float, gradients: Gradients, flush: Callable[[], object]
) -> Entry:
    def before() -> None:
        if operation.writes:
            gradients.restore()
        flush()

    call = partial(contender.calls[operation], gradients.parameters, limit)
    return Entry(contender.name, call, before, contender.context)


def passes_bytes(contender: Contender, operation: Operation, gradients: Gradients) -> int | None:
    passes = contender.passes(operation)
    return None if passes is None else passes * gradients.nbytes


def fastest_reader(samples: dict[str, Samples], nbytes: int) -> Measurement:
    floors = []
    for name in [name for name in samples if name.startswith(PREFIX)]:
        result = Measurement(name)
        add_times(result, samples.pop(name), nbytes, None)
        floors.append(result)
    return min(floors, key=lambda one: one.device_us or 0.0)


def add_times(result: Measurement, samples: Samples, bytes_moved: int | None, floor: Measurement | None) -> None:
    result.samples = len(samples.wall)
    result.p20_us, result.p50_us, result.p80_us = quantiles_us(samples.wall)
    result.host_us = quantiles_us(samples.host)[1]
    result.device_us = device_us = quantiles_us(samples.device)[1]
    if bytes_moved is not None:
        result.bytes_moved = bytes_moved
        result.gb_per_s = bytes_moved / device_us / 1e3
    if floor is not None and floor.device_us is not None:
        result.floor_fraction = floor.device_us / device_us
        result.beyond_floor_us = device_us - floor.device_us


def add_ratios(measurements: list[Measurement]) -> None:
    foreach = next((one.p50_us for one in measurements if one.contender == TORCH_FOREACH), None)
    for one in measurements:
        if foreach is not None and one.p50_us is not None:
            one.ratio_to_foreach = foreach / one.p50_us


def describe(
    case: Case, subject: Subject, settings: Settings, floor: Measurement, measurements: list[Measurement]
) -> Row:
    workload = subject.workload
    return Row(
        workload=case.workload,
        title=workload.title,
        cut=workload.cut,
        tensors=workload.tensors,
        elements=workload.elements,
        bytes=subject.gradients.nbytes,
        dtype=case.dtype,
        operation=case.operation.value,
        device=settings.device.type,
        threads=torch.get_num_threads(),
        floor=floor,
        contenders=measurements,
    )
