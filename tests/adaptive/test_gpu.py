"""On a GPU: rules and monitor never wait for it, and tell the host what has arrived."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusedclip import adaptive
from fusedclip.adaptive import AdaptiveRule
from fusedclip.monitor import GradMonitor
from fusedclip.optim import clip_on_step

from ..conftest import Engine, engines
from ..device_waits import no_waits
from .steps import SHAPES, gradients

RULES: list[Callable[[], AdaptiveRule]] = [
    adaptive.AutoClip,
    lambda: adaptive.AutoClip(50.0, window=5),
    adaptive.ZClip,
    adaptive.AdaGC,
    lambda: adaptive.EMAClip(1.1),
    adaptive.SkipSpikes,
]


def filled(engine: Engine) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(shape, device=engine.device)) for shape in SHAPES]
    for parameter, grad in zip(params, next(gradients(engine)), strict=True):
        parameter.grad = grad
    return params


@engines("cuda", "triton", on="cuda")
@pytest.mark.parametrize("make", RULES)
def test_a_rule_does_not_wait(engine: Engine, make: Callable[[], AdaptiveRule]) -> None:
    rule, params = make(), filled(engine)
    for _ in range(2):
        rule.clip_(params)
    with no_waits():
        rule.clip_(params)


@engines("cuda", "triton", on="cuda")
@pytest.mark.parametrize("make", RULES)
def test_clip_on_step_does_not_wait(engine: Engine, make: Callable[[], AdaptiveRule]) -> None:
    params = filled(engine)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    clip_on_step(optimizer, make())
    for _ in range(2):
        optimizer.step()
    with no_waits():
        optimizer.step()


@engines("cuda", "triton", on="cuda")
def test_a_monitor_does_not_wait_and_loses_nothing(engine: Engine) -> None:
    params = filled(engine)
    monitor = GradMonitor([(str(i), parameter) for i, parameter in enumerate(params)])
    for _ in range(2):
        monitor.clip_grad_norm_(adaptive.ZClip())
    with no_waits():
        for _ in range(5):
            monitor.clip_grad_norm_(1.0)
    for _ in range(200):  # more than the ring has room for
        monitor.clip_grad_norm_(1.0)
    monitor.flush()
    assert [record.step for record in monitor.history.records] == list(range(207))
    assert monitor.history.records[0].norm > 0
