"""Host-path micro-benchmarks: short lists of small tensors, where calling costs more than computing."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders import TORCH_FOREACH, line_up
from benchmarks.measure import Settings, gradients_like, judge
from benchmarks.oracle import Oracle
from benchmarks.suites import Operation

CONTENDERS = {one.name: one for one in line_up(torch.device("cpu")) if one.name in (TORCH_FOREACH, "fusedclip cpu")}
SETTINGS = Settings(torch.device("cpu"), list(CONTENDERS.values()))
ROUNDS = 50


@pytest.fixture(scope="module", params=["host-10x256", "host-100x256", "host-1000x256", "300x4096"])
def right(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(gradients_like(request.param, "float32", SETTINGS))


@pytest.mark.parametrize(
    "operation", [Operation.NOT_CLIPPED, Operation.CLIPPED, Operation.VALUE], ids=lambda one: one.value
)
@pytest.mark.parametrize("name", CONTENDERS)
def test_call(benchmark: BenchmarkFixture, right: Oracle, operation: Operation, name: str) -> None:
    contender, limit = CONTENDERS[name], operation.limit(right.norm)
    verdict = judge(contender, operation, right)
    assert not verdict.failure, verdict.failure
    benchmark.group = f"{right.gradients.workload.title}, {operation.value}"

    def setup() -> None:
        if operation.writes:
            right.gradients.restore()

    with contender.context():
        arguments = (right.gradients.parameters, limit)
        benchmark.pedantic(contender.calls[operation], arguments, setup=setup, rounds=ROUNDS, warmup_rounds=3)  # type: ignore[no-untyped-call]
