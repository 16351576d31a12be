"""Steps under torch.compile: a clip in the graph would not see the gradients of the day; it has to run before."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from fusedclip.optim import clip_on_step

from .optimizers import give_gradients, held, pair


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_step(fused: bool) -> None:
    """The clip runs before the graph; eager backend, since what is compiled is torch's own step."""
    ours, theirs = pair(AdamW, fused=fused)
    handle = clip_on_step(ours, 0.1)
    step = torch.compile(ours.step, backend="eager")
    for i in range(3):
        give_gradients(ours, theirs, seed=i)
        norm = nn.utils.clip_grad_norm_(held(theirs), 0.1)
        step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, norm)
    for a, b in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # torch compiles its own step to other roundings
    if fused:
        clip_on_step(theirs, 0.1, defer=True)
        with pytest.raises(RuntimeError, match="compiled step"):
            torch.compile(theirs.step, backend="eager")()
