"""The host learns no value on its way through a step, but for a look that is free."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fusedclip.optim import clip_on_step, on_step
from fusedclip.optim.skip import combine_flags, follow

from ..conftest import parameters
from ..host_reads import host_reads


@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW, functools.partial(SGD, momentum=0.9, dampening=0.5)], ids=["AdamW", "SGD"])
def test_the_host_reads_no_tensor(
    kind: Callable[..., Optimizer], defer: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the host looks at the coefficient, where that is free; with that look taken away none is left."""
    monkeypatch.setattr(on_step, "_seen_to_be_one", lambda coef: False)
    for skip in ("propagate", "skip"):
        grads = [torch.randn(n, dtype=dtype) for n in (10, 70001)]
        optimizer = kind(parameters(grads), fused=True)
        optimizer.step()  # an SGD with dampening waits until it has made its first
        clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite=skip)  # type: ignore[arg-type]
        with host_reads() as reads:
            optimizer.step()
        assert reads == []


def test_the_look_at_the_coefficient_is_for_the_cpu_alone() -> None:
    assert on_step._seen_to_be_one(torch.ones(()))
    assert not on_step._seen_to_be_one(torch.tensor(0.5))
    assert not on_step._seen_to_be_one(torch.ones((), device="meta"))


def test_a_scalar_on_its_way_to_the_host_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read before it has arrived, it would be whatever was in that memory."""
    asked = []

    def to(scalar: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        asked.append((device.type, non_blocking))
        return torch.ones((), device=device)

    monkeypatch.setattr(Tensor, "to", to)
    on_device = torch.ones((), device="meta")
    combine_flags([torch.zeros(()), on_device])
    follow(on_device, torch.device("cpu"))
    follow(torch.zeros(()), torch.device("meta"))
    assert asked == [("cpu", False), ("cpu", False), ("meta", True)]
