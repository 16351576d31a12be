"""What cannot be done is refused with the reason, before anything is written."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fusedclip.optim import clip_on_step

from ..conftest import parameters
from .optimizers import give_gradients, held, pair


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    def made(kind: type = SGD, **options: Any) -> Optimizer:
        return kind(parameters([torch.ones(3)]), lr=0.1, **options)

    with pytest.raises(ValueError, match=r"on_nonfinite='skip' needs an Adam.*this RMSprop has none"):
        clip_on_step(made(torch.optim.RMSprop), 1.0, on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite must be"):
        clip_on_step(made(), 1.0, on_nonfinite="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_norm is -1"):
        clip_on_step(made(), -1.0)
    with pytest.raises(ValueError, match="norm_type is NaN"):
        clip_on_step(made(), 1.0, math.nan)
    with pytest.raises(TypeError, match=r"got Linear; if that wraps one"):
        clip_on_step(nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    grouped = SGD([{"params": parameters([torch.ones(3)]), "max_norm": 1.0}], fused=True)
    with pytest.raises(ValueError, match=r"defer=True hands .* one coefficient"):
        clip_on_step(grouped, 1.0, defer=True)
    twice = made()
    handle = clip_on_step(twice, 1.0)
    with pytest.raises(ValueError, match="clips on step already"):
        clip_on_step(twice, 1.0)
    handle.remove()
    clip_on_step(twice, 1.0)

    class Unscaling(SGD):
        def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
            raise AssertionError

    unscaling = made(Unscaling)
    clip_on_step(unscaling, 1.0)
    with pytest.raises(RuntimeError, match="unscale_and_clip_grad_norm_"):
        unscaling.step(grad_scaler=object())


def test_a_failed_clip_changes_no_gradient_and_steps_nothing() -> None:
    ours, _ = pair(AdamW)
    ours.param_groups[0]["max_norm"] = 0.1
    clip_on_step(ours, 0.1)
    give_gradients(ours)
    held(ours)[3].grad = torch.ones(1).expand(4, 3)
    before = copy.deepcopy([(p.detach(), p.grad) for p in held(ours)])
    with pytest.raises(RuntimeError, match="is expanded"):
        ours.step()
    for p, (value, grad) in zip(held(ours), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)
