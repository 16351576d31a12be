"""A rule may be given wherever a limit is, and a step that is left out does not enter its state."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from fusedclip import adaptive, amp
from fusedclip.adaptive import AdaptiveRule
from fusedclip.optim import clip_on_step

from ..host_reads import host_reads
from .steps import SHAPES

Build = Callable[[], AdaptiveRule]
RULES: dict[str, Build] = {
    "AutoClip": lambda: adaptive.AutoClip(50.0),
    "ZClip": lambda: adaptive.ZClip(warmup_steps=3, max_grad_norm=2.0),
    "AdaGC": lambda: adaptive.AdaGC(warmup_steps=3),
    "EMAClip": lambda: adaptive.EMAClip(1.05),
    "SkipSpikes": lambda: adaptive.SkipSpikes(warmup_steps=3, max_norm=2.0),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
}


def parameters() -> list[nn.Parameter]:
    made = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=made)) for shape in SHAPES]


def fill(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    made = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=made) * scale * (1 + step % 3)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one["state"].items():
        torch.testing.assert_close(value, other["state"][name], rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
def test_clip_on_step_is_clip_and_step(name: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    if name == "SkipSpikes":
        pytest.skip("cannot be had as two calls")
    rule, other = RULES[name](), RULES[name]()
    params, others = parameters(), parameters()
    optimizer, twin = make(params), make(others)
    handle = clip_on_step(optimizer, rule)
    for step in range(8):
        fill(params, step)
        fill(others, step)
        optimizer.step()
        norm = other.clip_(others)
        twin.step()
        assert torch.equal(handle.total_norm, norm)
        for one, two in zip(params, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    same(rule.state_dict(), other.state_dict())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_scaler_unscales_first_and_what_it_skips_does_not_enter(name: str, fused: bool) -> None:
    rule, other = RULES[name](), RULES[name]()
    params, others = parameters(), parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        scaler.scale(torch.zeros(()))
        fill(params, step, scaler.get_scale())
        if step == 3:
            params[0].grad[0] = math.inf
        before = copy.deepcopy(params), rule.state_dict()
        amp.unscale_and_clip_grad_norm_(scaler, optimizer, rule)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert all(torch.equal(one, two) for one, two in zip(params, before[0], strict=True))
            if name != "SkipSpikes":
                same(rule.state_dict(), before[1])
            continue
        fill(others, step)
        other.clip_(others)
        for one, two in zip(params, others, strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=0)
    if name != "SkipSpikes":
        same(rule.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", RULES)
def test_a_scaler_that_leaves_unscaling_to_the_step(name: str) -> None:
    rule, other = RULES[name](), RULES[name]()
    params, others = parameters(), parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    twin = torch.optim.AdamW(others, lr=0.1, fused=True)
    clip_on_step(optimizer, rule)
    clip_on_step(twin, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=3000.0)  # no power of 2
    for step in range(6):
        scaler.scale(torch.zeros(()))
        fill(params, step, scaler.get_scale())
        if step == 4:
            params[2].grad.fill_(math.nan)
        before = rule.state_dict()
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            if name != "SkipSpikes":
                same(rule.state_dict(), before)
            continue
        fill(others, step)
        twin.step()
        for one, two in zip(params, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["AutoClip", "ZClip", "SkipSpikes"])
def test_a_step_that_another_group_has_skipped_does_not_enter(name: str) -> None:
    rule, params = RULES[name](), parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "max_norm": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    clip_on_step(optimizer, rule, on_nonfinite="skip")
    fill(params, 0)
    optimizer.step()
    before, weights = rule.state_dict(), copy.deepcopy(params)
    fill(params, 1)
    params[3].grad.fill_(math.inf)
    optimizer.step()
    same(rule.state_dict(), before)
    assert all(torch.equal(one, two) for one, two in zip(params, weights, strict=True))


@pytest.mark.filterwarnings("ignore:SkipSpikes has left out")
def test_skip_spikes_leaves_parameters_and_optimizer_as_they_are() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    rule = adaptive.SkipSpikes(factor=3.0, patience=2, warmup_steps=3)
    clip_on_step(optimizer, rule)
    moved = []
    for step in range(9):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, 100.0 if step in (4, 6, 7, 8) else 1.0)
        before = copy.deepcopy((params, optimizer.state_dict()["state"]))
        optimizer.step()
        after = (params, optimizer.state_dict()["state"])
        moved.append(not all(torch.equal(one, two) for one, two in zip(before[0], after[0], strict=True)))
        if not moved[-1]:
            assert all(torch.equal(before[1][0][key], after[1][0][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert moved == [True, True, True, True, False, True, False, False, True]
    assert rule.skipped is not None
    assert rule.skipped.item() == 3


def test_skip_spikes_goes_through_a_scaler() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    rule = adaptive.SkipSpikes(factor=3.0, warmup_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        scaler.scale(torch.zeros(()))
        fill(params, 0, scaler.get_scale() * (50 if step == 2 else 1))
        before = copy.deepcopy(params)
        amp.unscale_and_clip_grad_norm_(scaler, optimizer, rule)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], before[0]) == (step == 2)
    with pytest.raises(ValueError, match="this one is disabled"):
        amp.unscale_and_clip_grad_norm_(torch.amp.GradScaler("cpu", enabled=False), optimizer, rule)


@pytest.mark.parametrize("name", RULES)
def test_the_host_reads_nothing_of_the_device(name: str) -> None:
    """But what has arrived by itself: SkipSpikes' row of the step before."""
    rule, each = RULES[name](), torch.tensor([3.0, 4.0], dtype=torch.float64)
    rule.bind([torch.empty(2), torch.empty(3)])

    def step() -> None:
        if isinstance(rule, adaptive.AdaptiveEachRule):
            rule.of_each(each.norm(), each)
        else:
            rule(each.norm())
        rule.settle(torch.zeros(()))

    step()
    with host_reads() as seen:
        step()
    assert seen == (["tolist"] if name == "SkipSpikes" else [])


def test_a_closure_and_shared_parameters() -> None:
    shared = nn.Parameter(torch.ones(3))
    params = [shared, nn.Parameter(torch.ones(2)), shared]
    rule = adaptive.AdaGC(warmup_steps=0)
    for size in (1.0, 5.0):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, size)
        rule.clip_(params)
    torch.testing.assert_close(shared.grad, torch.full((3,), 1.05))
    torch.testing.assert_close(params[1].grad, torch.full((2,), 1.05))


def test_a_rule_can_be_copied() -> None:
    rule, params = adaptive.SkipSpikes(), parameters()
    fill(params, 0)
    rule.clip_(params)
    same(copy.deepcopy(rule).state_dict(), rule.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", RULES)
def test_a_distributed_checkpoint_restores_a_rule(name: str, tmp_path: Path) -> None:
    """It loads in place, and only what a new rule's state_dict has."""
    rule, other, params = RULES[name](), RULES[name](), parameters()
    for step in range(5):
        fill(params, step)
        rule.clip_(params)
    checkpoint.save({"clip": rule.state_dict()}, checkpoint_id=tmp_path)
    other.bind(params)
    saved = {"clip": other.state_dict()}
    checkpoint.load(saved, checkpoint_id=tmp_path)
    other.load_state_dict(saved["clip"])
    same(rule.state_dict(), other.state_dict())
    fill(params, 5)
    norm = rule.clip_(params)
    fill(params, 5)
    assert torch.equal(other.clip_(params), norm)
    same(rule.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", RULES)
def test_a_state_saved_before_the_first_step(name: str) -> None:
    rule, other, params = RULES[name](), RULES[name](), parameters()
    other.load_state_dict(rule.state_dict())
    for one in (rule, other):
        fill(params, 0)
        one.clip_(params)
    same(rule.state_dict(), other.state_dict())


def test_steps_without_gradients_change_nothing() -> None:
    rule = adaptive.AutoClip()
    norm = rule.clip_(parameters())
    assert norm.item() == 0
    assert rule.threshold is None


@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
def test_skip_spikes_of_nothing_is_no_spike() -> None:
    rule, params = adaptive.SkipSpikes(), parameters()
    assert rule.clip_(params).item() == 0
    fill(params, 0, math.nan)
    assert rule.clip_(params).item() == 1
    for parameter in params:
        parameter.grad = None
    assert rule.clip_(params).item() == 0


@pytest.mark.parametrize("name", ["AdaGC", "EMAClip"])
def test_a_list_that_was_not_measured_is_not_the_one_to_come(name: str) -> None:
    rule, params = RULES[name](), parameters()
    fill(params, 0)
    expanded = nn.Parameter(torch.zeros(4))
    expanded.grad = torch.ones(1).expand(4)
    rule.clip_([])
    with pytest.raises(RuntimeError, match="is expanded"):
        rule.clip_([*params, expanded])
    rule.clip_(params)
    with pytest.raises(ValueError, match="these 2 are others"):
        rule.clip_(params[:2])
