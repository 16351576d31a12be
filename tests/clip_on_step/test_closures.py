"""Steps with a closure, whose gradients are clipped whenever it has made them."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from fusedclip.optim import clip_on_step

from .optimizers import assert_same, closure_for, held, pair


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("fused", "defer"), [(False, None), (True, None), (True, False), (True, True)])
def test_a_closures_gradients_are_clipped(by_name: bool, fused: bool, defer: bool | None) -> None:
    ours, theirs = pair(AdamW, fused=fused)
    clip_on_step(ours, 0.3, defer=defer)
    for _ in range(4):
        mine = closure_for(ours, clip=False)
        loss = ours.step(closure=mine) if by_name else ours.step(mine)
        torch.testing.assert_close(loss, theirs.step(closure_for(theirs, clip=True)))
        ours.step(None)
        nn.utils.clip_grad_norm_(held(theirs), 0.3)
        theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_clips_at_every_evaluation(line_search: str | None) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64))]
        made.append(torch.optim.LBFGS(ps, lr=0.5, max_iter=5, line_search_fn=line_search))
    ours, theirs = made
    handle = clip_on_step(ours, 0.3)
    ours.step(closure_for(ours, clip=False))
    assert handle.clip_coef < 1
    theirs.step(closure_for(theirs, clip=True))
    for _ in range(3):
        ours.step(closure_for(ours, clip=False))
        theirs.step(closure_for(theirs, clip=True))
    torch.testing.assert_close(held(ours), held(theirs), rtol=1e-9, atol=1e-12)


def test_a_closure_that_raises_leaves_nothing_behind() -> None:
    ours, fresh = pair(AdamW, fused=True)
    handle = clip_on_step(ours, 0.3, defer=True)

    def closure() -> float:
        raise KeyError

    with pytest.raises(KeyError):
        ours.step(closure)
    assert vars(ours).keys() == vars(fresh).keys()
    assert handle.total_norm is None
