"""A run that is saved and goes on: from torch's optimizers and to them, between options, exactly if nothing is lost."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedclip.optim import SGD, AdamW

PAIRS = [
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"amsgrad": True}),
    (SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    (SGD, torch.optim.SGD, {"lr": 0.01}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"moments": torch.bfloat16},
    {"moments": torch.float32},
    {"master": "fp32"},
    {"master": "split"},
    {"master": "split", "moments": torch.bfloat16},
]


def made(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    ps = [Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (30, 700)]
    optimizer: Optimizer = kind([{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.1}], **options)
    return optimizer


def held(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in held(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def take_over(optimizer: Optimizer, other: Optimizer, state_dict: dict[str, Any] | None = None) -> None:
    """Parameters and state of another optimizer, by way of a copy."""
    for p, q in zip(held(optimizer), held(other), strict=True):
        p.data.copy_(q.data)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict() if state_dict is None else state_dict))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of remainders, too, which as numbers may be NaN."""
    return a.dtype == b.dtype and bool(torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)))


def assert_close(ours: Optimizer, theirs: Optimizer) -> None:
    for p, q in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("through", ["state_dict", "torch_state_dict"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "torchs", "options"), PAIRS, ids=str)
def test_from_torch_and_back(kind: Any, torchs: Any, options: dict[str, Any], fused: bool, through: str) -> None:
    straight = made(torchs, **options)
    train(straight, 0, 30)
    before, ours, after = made(torchs, **options, fused=fused), made(kind, **options), made(torchs, **options)
    train(before, 0, 10)
    take_over(ours, before)
    train(ours, 10, 20)
    take_over(after, ours, getattr(ours, through)())
    train(after, 20, 30)
    assert_close(after, straight)
    if through == "torch_state_dict":
        theirs, mine = straight.state_dict(), ours.torch_state_dict()  # type: ignore[attr-defined]
        assert mine["state"].keys() == theirs["state"].keys()
        for key in mine["state"]:
            assert mine["state"][key].keys() == theirs["state"][key].keys()
        assert [g.keys() for g in mine["param_groups"]] == [g.keys() for g in theirs["param_groups"]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_to_own_is_exact(dtype: torch.dtype, options: dict[str, Any]) -> None:
    straight, ours = made(AdamW, dtype, **options), made(AdamW, dtype, **options)
    train(straight, 0, 20)
    train(ours, 0, 10)
    resumed = made(AdamW, dtype, **options)
    take_over(resumed, ours)
    for p, q in zip(held(resumed), held(ours), strict=True):
        assert {k: v.dtype for k, v in resumed.state[p].items()} == {k: v.dtype for k, v in ours.state[q].items()}
    train(resumed, 10, 20)
    for p, q in zip(held(resumed), held(straight), strict=True):
        assert torch.equal(p, q)
        for name, value in straight.state[q].items():
            assert same_bits(resumed.state[p][name], value)


@pytest.mark.parametrize(("before", "after"), [("fp32", "split"), ("split", "fp32")])
def test_a_master_changes_its_form(before: Any, after: Any) -> None:
    straight, ours = made(AdamW, torch.bfloat16, master=before), made(AdamW, torch.bfloat16, master=before)
    train(straight, 0, 20)
    train(ours, 0, 10)
    resumed: Any = made(AdamW, torch.bfloat16, master=after)
    take_over(resumed, ours)
    train(resumed, 10, 20)
    for p, q in zip(held(resumed), held(straight), strict=True):
        assert torch.equal(resumed.master_of(p), straight.master_of(q))  # type: ignore[attr-defined]


def test_masters_are_built_from_what_torch_left_and_dropped_with_a_word() -> None:
    theirs = made(torch.optim.AdamW, torch.bfloat16)
    train(theirs, 0, 5)
    ours: Any = made(AdamW, torch.bfloat16, master="fp32")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for p, q in zip(held(ours), held(theirs), strict=True):  # after the optimizer, as some loaders do
        p.data.copy_(q.data)
    for p in held(ours):
        p.grad = torch.zeros_like(p)
    ours.param_groups[0]["lr"] = ours.param_groups[1]["lr"] = 0.0
    ours.step()
    for p in held(ours):
        assert torch.equal(ours.master_of(p), p.detach().float())
        assert ours.state[p]["exp_avg"].dtype == torch.float32
    with pytest.warns(UserWarning, match="masters of 2 parameters"):
        ours.torch_state_dict()
    plain = made(AdamW, torch.bfloat16)
    with pytest.warns(UserWarning, match="masters of 2 parameters"):
        plain.load_state_dict(ours.state_dict())
    assert all("master" not in plain.state[p] for p in held(plain))


def test_what_torch_made_of_a_master_is_none() -> None:
    """torch's optimizer keeps what it does not know, cast to bf16, and does not move it."""
    ours: Any = made(AdamW, torch.bfloat16, master="fp32")
    train(ours, 0, 5)
    theirs = made(torch.optim.AdamW, torch.bfloat16)
    take_over(theirs, ours)
    train(theirs, 5, 10)
    take_over(ours, theirs)
    assert all("master" not in ours.state[p] for p in held(ours))


def test_limits_are_not_part_of_a_checkpoint_but_a_groups_own() -> None:
    ours = made(AdamW, max_norm=1.0)
    assert "max_norm" not in ours.state_dict()["param_groups"][0]
    ours.param_groups[1]["max_norm"] = 0.5
    ours.load_state_dict(copy.deepcopy(made(torch.optim.AdamW).state_dict()))
    assert "max_norm" not in ours.param_groups[0]
    assert ours.param_groups[1]["max_norm"] == 0.5
    other = made(AdamW, max_norm=1.0)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert other.param_groups[1]["max_norm"] == 0.5


def test_hooks_see_plain_tensors() -> None:
    ours, other = made(AdamW), made(AdamW)
    train(other, 0, 2)
    seen = []
    ours.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(type(loaded["state"][0]["exp_avg"])))
    ours.register_load_state_dict_post_hook(lambda self: seen.append(type(self.state[held(self)[0]]["exp_avg"])))
    ours.load_state_dict(other.state_dict())
    assert seen == [torch.Tensor, torch.Tensor]


def test_a_copy_goes_on_alike() -> None:
    ours = made(AdamW, torch.bfloat16, master="split", max_norm=0.1)
    train(ours, 0, 3)
    twin = copy.deepcopy(ours)
    for one in (ours, twin):
        train(one, 3, 6)
    for p, q in zip(held(ours), held(twin), strict=True):
        assert torch.equal(p, q)
        assert p is not q
