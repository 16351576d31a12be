"""Steps that a GradScaler skips, beside what test_training.py shows of it."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fusedclip.optim import clip_on_step

from .optimizers import assert_same, give_gradients, held, pair


def scale_gradients(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    scaler.scale(torch.zeros(()))  # makes its scale
    torch._foreach_mul_([p.grad for p in held(optimizer)], scaler.get_scale())


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("first_good", [0, 1, 2])
@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("asked", [{}, {"defer": False}, {"defer": True}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_skipped_first_steps_leave_the_momentum_of_an_sgd_that_is_not_fused(
    dampening: float, first_good: int, unscaled_before: bool, asked: dict[str, Any]
) -> None:
    ours, theirs = (pair(SGD, momentum=0.9, dampening=dampening, fused=fused)[0] for fused in (True, False))
    clip_on_step(ours, 0.5, **asked)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for step in range(first_good + 3):
        give_gradients(ours, theirs, seed=step, bad=torch.inf if step < first_good else None)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scale_gradients(scaler, optimizer)
            if unscaled_before or optimizer is theirs:
                scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(held(theirs), 0.5)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert_same(ours, theirs)
    for mine, other in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(ours.state[mine], theirs.state[other], rtol=2e-6, atol=1e-7)


def test_a_skipped_first_step_that_would_leave_garbage_is_refused() -> None:
    """A subclass sees its own self, from which nothing keeps its step."""

    class Own(SGD):
        pass

    ours, theirs = pair(Own, momentum=0.9, dampening=0.5, fused=True)
    clip_on_step(ours, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    give_gradients(ours, bad=torch.inf)
    before = copy.deepcopy([(p.detach(), p.grad) for p in held(ours)])
    with pytest.raises(RuntimeError, match=r"first step of this Own with .*dampening=0 or fused=False"):
        scaler.step(ours)
    torch.testing.assert_close([(p.detach(), p.grad) for p in held(ours)], before, rtol=0, atol=0)
    assert not ours.state

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    give_gradients(ours, theirs)
    scaler.step(ours)
    nn.utils.clip_grad_norm_(held(theirs), 0.5)
    theirs.step()
    assert_same(ours, theirs)


def test_skip_under_a_scaler_that_found_no_gradients() -> None:
    ours, _ = pair(AdamW, fused=True)
    clip_on_step(ours, 0.1, on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for parameter in held(ours):
        parameter.grad = None
    scaler.unscale_(ours)
    with contextlib.suppress(AssertionError):  # torch's: no inf checks were recorded
        scaler.step(ours)
    ours.found_inf = 0  # what torch makes of no device at all
    ours.step()
