"""Param groups with limits of their own: one that leaks into its neighbour, memory that two of them would scale."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from fusedclip.optim import clip_on_step

from .optimizers import assert_same, give_gradients, held, pair


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_groups_own_max_norm(fused: bool, with_scaler: bool) -> None:
    ours, theirs = pair(AdamW, fused=fused)
    ours.param_groups[1]["max_norm"] = 0.25
    ours.param_groups[0]["max_norm"] = None
    handle = clip_on_step(ours, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        if with_scaler:
            for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
                scaler.scale(torch.zeros(()))
                torch._foreach_mul_([p.grad for p in held(optimizer)], scaler.get_scale())
            scalers[1].unscale_(theirs)
        rest = nn.utils.clip_grad_norm_(theirs.param_groups[0]["params"], 0.5)
        own = nn.utils.clip_grad_norm_(theirs.param_groups[1]["params"], 0.25)
        if with_scaler:
            scalers[0].step(ours)
            for scaler in scalers:
                scaler.update()
        else:
            ours.step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, rest)
        torch.testing.assert_close(handle.group_norms, {1: own})
    assert_same(ours, theirs)


def plain() -> Tensor:
    return torch.tensor([1.0, 1.0])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("own", [None, 0.5])
def test_plain_tensors_without_gradients_are_left_alone(fused: bool, own: float | None) -> None:
    """torch's step does nothing with them; the group beside them is clipped as ever."""
    alone = plain()
    optimizer = SGD([{"params": [alone], "max_norm": own}], lr=1.0, fused=fused)
    clip_on_step(optimizer, 1.0)
    optimizer.step()
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    beside = SGD([{"params": [alone], "max_norm": own}, {"params": [weight]}], lr=1.0, fused=fused)
    clip_on_step(beside, 1.0)
    beside.step()
    assert torch.equal(alone, plain())
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("limits", [(0.5, 0.25), (0.5, None), (None, 0.5)])
@pytest.mark.parametrize("part", [slice(None), slice(2)])
def test_memory_under_two_coefficients_is_refused(limits: tuple[float | None, float | None], part: slice) -> None:
    """Scaled once by each, a gradient that two groups share would be scaled by both."""
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4)[part].clone())]
    shared = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights[0].grad, weights[1].grad = shared, shared[part]
    optimizer = SGD([{"params": [w], "max_norm": limit} for w, limit in zip(weights, limits, strict=True)], lr=1.0)
    clip_on_step(optimizer, 0.75)
    before = copy.deepcopy((weights, shared))
    with pytest.raises((RuntimeError, ValueError), match="share") as error:
        optimizer.step()
    assert "[0]" in str(error.value)
    assert "[1]" in str(error.value)
    torch.testing.assert_close((weights, shared), before, rtol=0, atol=0)
