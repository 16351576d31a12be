"""Gradients of mixed dtypes, and the contenders that take one dtype at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.contenders import TORCH_FOREACH, fusedclip_contender, multi_tensor, torch_contender
from benchmarks.gradients import Gradients
from benchmarks.measure import Settings, run_suite
from benchmarks.suites import Case, Operation, Suite
from benchmarks.workloads import Workload

CPU = torch.device("cpu")


def fake_kernels(scales: list[str]) -> Any:
    """The peers' two kernels in plain torch; like theirs, they take one dtype at a time."""

    def l2norm(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], each: bool) -> tuple[torch.Tensor, Any]:
        (grads,) = lists
        assert len({grad.dtype for grad in grads}) == 1
        return torch.cat([grad.double().flatten() for grad in grads]).norm().float().reshape(1), None

    def scale(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], factor: Any) -> None:
        for source, target in zip(*lists, strict=True):
            target.copy_(source.double() * float(factor))

    return SimpleNamespace(multi_tensor_l2norm=l2norm, **dict.fromkeys(scales, scale))


@pytest.mark.parametrize("scales", [["multi_tensor_scale"], ["multi_tensor_scale", "multi_tensor_scale_tensor"]])
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_peers_are_called_as_their_libraries_call_them(scales: list[str], dtype: str) -> None:
    contender = multi_tensor("apex", fake_kernels(scales=scales))
    cases = tuple(Case("host-10x256", dtype, operation) for operation in contender.calls)
    for row in run_suite(Suite(cases, 0.01), Settings(CPU, [contender]), lambda case: None):
        assert not row.contenders[0].failure


def test_mixed_gradients_take_turns_and_are_judged() -> None:
    workload = Workload("x", ((3,), (2, 2), (5,)))
    gradients = Gradients(workload, "mixed", CPU, seed=0)
    assert [tensor.dtype for tensor in gradients.tensors] == [torch.float32, torch.bfloat16, torch.float32]
    assert gradients.nbytes == 8 * 4 + 4 * 2
    assert all(map(torch.equal, gradients.tensors, gradients.saved))
    gradients.tensors[1].zero_()
    assert gradients.saved[1].all()
    gradients.restore()
    assert all(map(torch.equal, gradients.tensors, gradients.saved))
    cases = tuple(Case("host-10x256", "mixed", one) for one in (Operation.CLIPPED, Operation.NORM, Operation.VALUE))
    contenders = [torch_contender(TORCH_FOREACH, foreach=True), fusedclip_contender("cpu")]
    for row in run_suite(Suite(cases, 0.01), Settings(CPU, contenders), lambda case: None):
        assert row.bytes == 10 * 256 * 3
        assert [one.failure for one in row.contenders] == ["", ""]
