"""A Ctrl-C during a step leaves it made or not begun, over several kinds of groups too."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fusedclip.backends import reference_update
from fusedclip.backends.cpu import CpuUpdater
from fusedclip.optim import AdamW, moving


def made() -> AdamW:
    ps = [Parameter(torch.ones(n)) for n in (3, 4)]
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    return AdamW([{"params": ps[:1]}, {"params": ps[1:], "amsgrad": True}], max_norm=1.0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_a_step_is_whole_or_not_begun(number: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes, for a group with amsgrad and one without; the interrupt comes in one of them."""
    original, calls = CpuUpdater.update_, []

    def update_(self: CpuUpdater, *args: Any) -> None:
        calls.append(args)
        if len(calls) == number + 1 and not after:
            raise KeyboardInterrupt
        original(self, *args)
        if len(calls) == number + 1:
            raise KeyboardInterrupt

    ours, whole = made(), made()
    whole.step()
    versions = [p._version for group in ours.param_groups for p in group["params"]]
    monkeypatch.setattr(CpuUpdater, "update_", update_)
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    stepped = number == 1 or after
    for group, other, version in zip(ours.param_groups, whole.param_groups, versions, strict=True):
        (p,), (q,) = group["params"], other["params"]
        assert torch.equal(p, q if stepped else torch.ones_like(p))
        assert ours.state[p]["step"] == float(stepped)
        assert (p._version > version) == stepped


def test_telling_autograd_of_one_group_does_not_leave_the_next_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = moving.increment_version, []

    def interrupted_once(tensors: list[torch.Tensor]) -> None:
        told.append(tensors)
        if len(told) == 1:
            raise KeyboardInterrupt
        real(tensors)

    ours, whole = made(), made()
    whole.step()
    monkeypatch.setattr(moving, "increment_version", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    for group, other in zip(ours.param_groups, whole.param_groups, strict=True):
        assert torch.equal(group["params"][0], other["params"][0])


@pytest.mark.parametrize("name", ["_moved", "store"])
@pytest.mark.parametrize("number", range(5))
def test_parameters_that_the_reference_moves_are_all_moved_or_none(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whose gradients have another order of memory, beside one that the engine takes."""

    def made() -> tuple[AdamW, list[torch.Tensor]]:
        ps = [Parameter(torch.ones(3, 4)) for _ in range(3)]
        for p, grad in zip(ps, (torch.ones(4, 3).t(), torch.ones(3, 4), torch.ones(4, 3).t()), strict=True):
            p.grad = grad
        optimizer = AdamW(ps)
        optimizer.step()
        return optimizer, [*ps, *(tensor for p in ps for tensor in optimizer.state[p].values())]

    (ours, got), (whole, want) = made(), made()
    before = [tensor.clone() for tensor in got]
    whole.step()
    real, calls = getattr(reference_update, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(reference_update, name, interrupted)
    if number < {"_moved": 2, "store": 8}[name]:
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    else:
        ours.step()
    stepped = want if (name, number) != ("_moved", 0) else before
    assert all(map(torch.equal, got, stepped))
