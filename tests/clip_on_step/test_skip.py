"""Steps that are skipped leave parameters and state as they were, the first one included."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fusedclip.optim import clip_on_step

from .optimizers import FUSED_KINDS, assert_same, give_gradients, held, pair


@pytest.mark.parametrize("kind", FUSED_KINDS, ids=str)
@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("p", [2.0, 0.0, 3.0])
@pytest.mark.parametrize("first_bad", [0, 2])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_skip(kind: tuple[type, dict[str, Any]], defer: bool | None, bad: float, p: float, first_bad: int) -> None:
    """A step with a NaN or an inf leaves parameters and state as they were, the first one included."""
    ours, theirs = pair(kind[0], fused=True, **kind[1])
    handle = clip_on_step(ours, 0.5, p, on_nonfinite="skip", defer=defer)
    for step in range(5):
        is_bad = step in (first_bad, first_bad + 1)
        give_gradients(ours, theirs, seed=step, bad=bad if is_bad else None)
        before = copy.deepcopy(held(ours))
        ours.step()
        if is_bad:
            assert p == 0 or not handle.total_norm.isfinite()
            assert all(torch.equal(a, b) for a, b in zip(held(ours), before, strict=True))
        else:
            nn.utils.clip_grad_norm_(held(theirs), 0.5, p)
            theirs.step()
    assert_same(ours, theirs)
    for mine, other in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(ours.state[mine], theirs.state[other], rtol=2e-6, atol=1e-7)
