"""Host-path micro-benchmarks: short lists of small tensors, where calling costs more than computing."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders import TORCH_FOREACH, line_up
from benchmarks.measure import Settings, Subject, judge
from benchmarks.operations import Operation

CONTENDERS = {one.name: one for one in line_up(torch.device("cpu")) if one.name in (TORCH_FOREACH, "fusedclip cpu")}
SETTINGS = Settings(torch.device("cpu"), list(CONTENDERS.values()))
ROUNDS = 50


@pytest.fixture(scope="module", params=["host-10x256", "host-100x256", "host-1000x256", "300x4096"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject.make(request.param, "float32", SETTINGS)


@pytest.mark.parametrize(
    "operation", [Operation.NOT_CLIPPED, Operation.CLIPPED, Operation.VALUE], ids=lambda one: one.value
)
@pytest.mark.parametrize("name", CONTENDERS)
def test_call(benchmark: BenchmarkFixture, subject: Subject, operation: Operation, name: str) -> None:
    contender, limit = CONTENDERS[name], operation.limit(subject.right.norm)
    verdict = judge(contender, operation, subject)
    assert not verdict.failure, verdict.failure
    benchmark.group = f"{subject.workload.title}, {operation.value}"

    def setup() -> None:
        if operation.writes:
            subject.gradients.restore()

    with contender.context():
        arguments = (subject.gradients.parameters, limit)
        benchmark.pedantic(contender.calls[operation], arguments, setup=setup, rounds=ROUNDS, warmup_rounds=3)  # type: ignore[no-untyped-call]
