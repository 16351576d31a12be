"""Each method is its paper's formula: 300 steps beside one in plain floats, saved and restored on the way."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedclip import adaptive
from fusedclip.adaptive import AdaptiveRule

from ..conftest import EXAMPLES, Engine, engines
from . import plain
from .steps import SHAPES, STEPS, gradients, norms

METHODS: dict[str, tuple[Callable[..., AdaptiveRule], Callable[..., Any], dict[str, Any]]] = {
    "AutoClip": (adaptive.AutoClip, plain.AutoClip, {}),
    "AutoClip, all": (adaptive.AutoClip, plain.AutoClip, {"percentile": 93.0}),
    "AutoClip, window": (adaptive.AutoClip, plain.AutoClip, {"percentile": 80.0, "window": 17}),
    "ZClip": (adaptive.ZClip, plain.ZClip, {}),
    "ZClip, alone": (adaptive.ZClip, plain.ZClip, {"max_grad_norm": None, "clip_factor": 0.7}),
    "ZClip, mean": (adaptive.ZClip, plain.ZClip, {"clip_option": "mean", "max_grad_norm": None, "warmup_steps": 50}),
    "ZClip, percentile": (adaptive.ZClip, plain.ZClip, {"mode": "percentile", "max_grad_norm": None}),
    "ZClip, no update": (adaptive.ZClip, plain.ZClip, {"skip_update_on_spike": True, "max_grad_norm": None}),
    "AdaGC": (adaptive.AdaGC, plain.AdaGC, {}),
    "AdaGC, at once": (adaptive.AdaGC, plain.AdaGC, {"warmup_steps": 0, "lambda_rel": 1.3}),
    "EMAClip": (adaptive.EMAClip, plain.EMAClip, {"max_norm_ratio": 1.1}),
    "EMAClip, below": (adaptive.EMAClip, plain.EMAClip, {"max_norm_ratio": 0.9, "beta": 0.8}),
    "SkipSpikes": (adaptive.SkipSpikes, plain.SkipSpikes, {}),
}


def parameters(engine: Engine) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, device=engine.device)) for shape in SHAPES]


def clip(rule: AdaptiveRule, params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    rule.clip_(params)


def restored(rule: AdaptiveRule, build: Callable[[], AdaptiveRule]) -> AdaptiveRule:
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file))
    return other


def assert_multiplied(params: list[nn.Parameter], before: list[Tensor | None], coefs: list[float]) -> None:
    """All elements at once: to compare takes longer than to clip."""
    assert [p.grad is None for p in params] == [grad is None for grad in before]
    after = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    pairs = zip(before, coefs, strict=True)
    expected = torch.cat([(grad.double() * coef).flatten() for grad, coef in pairs if grad is not None])
    finite = expected.isfinite()
    torch.testing.assert_close(after[finite], expected[finite], rtol=3e-6, atol=1e-30)


@pytest.mark.filterwarnings("ignore:SkipSpikes has left out")
@pytest.mark.parametrize("name", METHODS)
def test_each_step_is_the_formula(engine: Engine, name: str) -> None:
    slow = engine.name == "triton" or (engine.name == "cuda" and EXAMPLES < 100)
    if slow and engine.device == "cpu" and ", " in name:
        pytest.skip("kernels that are interpreted take long, and know nothing of rules: one of each method is enough")
    method, formula, options = METHODS[name]
    rule, expected, params, clipped = method(**options), formula(**options), parameters(engine), 0
    for step, grads in enumerate(gradients(engine)):
        if step == STEPS // 2 + 20:
            rule = restored(rule, lambda: method(**options))
        clip(rule, params, grads)
        each = norms(grads)
        coefs = expected.step(each)
        assert rule.total_norm is not None
        assert math.isclose(float(rule.total_norm), plain.total(each), rel_tol=1e-6) or not math.isfinite(
            plain.total(each)
        )
        assert_multiplied(params, grads, coefs)
        clipped += any(coef < 1 for coef in coefs)
    assert clipped > 5 or name == "SkipSpikes"
    assert_state(rule, expected)


def assert_state(rule: AdaptiveRule, expected: Any) -> None:
    """The state as well, at the end."""
    state = rule.state_dict()["state"]
    if isinstance(expected, plain.AutoClip):
        filled = state["history"][state["history"].isfinite()]
        torch.testing.assert_close(filled.sort().values.cpu(), torch.tensor(expected.history).double().sort().values)
    elif isinstance(expected, plain.ZClip):
        assert [float(state["mean"]), float(state["var"])] == pytest.approx([expected.mean, expected.var], rel=1e-6)
    elif isinstance(expected, plain.AdaGC):
        assert state["gamma"].tolist() == pytest.approx([expected.gamma[i] for i in range(len(SHAPES))], rel=1e-6)
    elif isinstance(expected, plain.EMAClip):
        assert state["average"].tolist() == pytest.approx([expected.average[i] for i in range(len(SHAPES))], rel=1e-6)
    else:
        found = {name: value.item() for name, value in state.items()}
        assert found == pytest.approx({name: getattr(expected, name) for name in found}, rel=1e-6)
        assert found["skipped"] > 5


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", METHODS)
def test_a_norm_that_is_not_finite_never_enters_the_state(engine: Engine, name: str, bad: float) -> None:
    method, _, options = METHODS[name]
    rule, params = method(**options), parameters(engine)
    for grads in gradients(engine, steps=2):
        clip(rule, params, grads)
    before, threshold = rule.state_dict()["state"], rule.threshold
    assert threshold is not None
    threshold = threshold.clone()
    clip(rule, params, [torch.full(shape, bad, device=engine.device) for shape in SHAPES])
    after = rule.state_dict()["state"]
    for entry in before.keys() - {"streak", "skipped"}:
        assert torch.equal(before[entry], after[entry]), entry
    assert rule.threshold is not None
    if name != "SkipSpikes":
        assert torch.equal(rule.threshold, threshold)


@engines("cpu", "cuda")
def test_a_history_grows_beyond_its_first_buffer(engine: Engine) -> None:
    rule = adaptive.AutoClip(50.0)
    norms = torch.rand(2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for norm in norms.to(engine.device):
        rule(norm)
        rule.settle()
    assert rule.threshold is not None
    assert float(rule.threshold) == pytest.approx(norms.quantile(0.5).item(), rel=1e-12)


def test_a_spike_is_told_a_step_later_and_a_streak_is_warned_of(engine: Engine) -> None:
    rule = adaptive.SkipSpikes(factor=3.0, patience=2, warmup_steps=2)
    parameter = nn.Parameter(torch.zeros(3, device=engine.device))

    def clip(size: float) -> float:
        parameter.grad = torch.full((3,), size, device=engine.device)
        return float(rule.clip_([parameter]))

    assert [clip(1.0), clip(1.0), clip(9.0)] == [0, 0, 1]
    assert rule.told is None or not rule.told.skipped
    assert clip(9.0) == 1
    if engine.device == "cpu":
        assert rule.told is not None
        assert (rule.told.skipped, rule.told.streak) == (True, 1)
        with pytest.warns(UserWarning, match="left out 2 steps in a row"):
            assert clip(9.0) == 0  # a level that stays is no spike
        assert rule.threshold is not None
        assert float(rule.threshold) == pytest.approx(3 * 3**0.5)
        assert [clip(9.0), clip(9.0)] == [0, 0]


@pytest.mark.parametrize("skip", [True, False])
def test_zclip_takes_a_spike_for_one_below_its_limit_too(skip: bool) -> None:
    """Where clip_factor lifts the limit above the norm."""
    rule = adaptive.ZClip(warmup_steps=2, max_grad_norm=None, clip_factor=9.0, skip_update_on_spike=skip)
    expected = plain.ZClip(warmup_steps=2, max_grad_norm=None, clip_factor=9.0, skip_update_on_spike=skip)
    for norm in (1.0, 1.1, 3.0, 1.0):
        assert float(rule(torch.tensor(norm, dtype=torch.float64))) == expected.step([norm])[0]
        rule.settle()
    state = rule.state_dict()["state"]
    assert float(state["mean"]) == pytest.approx(expected.mean, rel=1e-12)
    assert float(state["var"]) == pytest.approx(expected.var, rel=1e-12)
