"""What cannot be is refused in words that say what can; the gradients stay as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedclip
from fusedclip import adaptive
from fusedclip.optim import clip_on_step

from ..conftest import parameters


def ones(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return parameters([torch.ones(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: adaptive.AutoClip(-1), ValueError, "percentile is -1; it must be at least 0 and at most 100"),
        (lambda: adaptive.AutoClip(100.5), ValueError, "percentile is 100.5"),
        (lambda: adaptive.AutoClip(float("nan")), ValueError, "percentile is nan"),
        (lambda: adaptive.AutoClip("high"), TypeError, "percentile must be a number, got 'high'"),  # type: ignore[arg-type]
        (lambda: adaptive.AutoClip(window=0), ValueError, "window is 0; it must be at least 1"),
        (lambda: adaptive.AutoClip(window=2.5), TypeError, "window must be a whole number"),  # type: ignore[arg-type]
        (lambda: adaptive.ZClip(alpha=1.2), ValueError, "alpha is 1.2"),
        (lambda: adaptive.ZClip(z_thresh=0), ValueError, "z_thresh is 0; it must be above 0"),
        (lambda: adaptive.ZClip(mode="other"), ValueError, "mode must be 'zscore' or 'percentile'"),  # type: ignore[arg-type]
        (lambda: adaptive.ZClip(clip_option="x"), ValueError, "clip_option must be"),  # type: ignore[arg-type]
        (lambda: adaptive.AdaGC(beta=-0.1), ValueError, "beta is -0.1"),
        (lambda: adaptive.AdaGC(warmup_steps=-1), ValueError, "warmup_steps is -1"),
        (lambda: adaptive.EMAClip(-2.0), ValueError, "max_norm_ratio is -2"),
        (lambda: adaptive.SkipSpikes(1.0), ValueError, "factor is 1; it must be above 1"),
        (lambda: adaptive.SkipSpikes(max_norm=-1.0), ValueError, "max_norm is -1"),
        (lambda: adaptive.adaptive_clip_grad_(ones((2,)), -1), ValueError, "clip_factor is -1"),
        (lambda: adaptive.adaptive_clip_grad_(ones((2,)), exclude=torch.ones(2)), TypeError, "must be parameters"),
        (lambda: adaptive.clip_by_block_rms_(ones((2,)), 0), ValueError, "threshold is 0; it must be above 0"),
        (lambda: adaptive.kl_clip_(ones((2,)), [], 1e-3, 0.1), ValueError, "1 parameters and 0 preconditioned"),
        (lambda: adaptive.kl_clip_(ones((2,)), [torch.ones(3)], 1e-3, 0.1), ValueError, r"preconditioned\[0\] is"),
        (lambda: adaptive.kl_clip_(ones((2,)), [torch.ones(2)], 0, 0.1), ValueError, "max_kl is 0"),
        (lambda: fusedclip.clip_grad_norm_(ones((2,)), adaptive.AutoClip()), TypeError, r"call its clip_\("),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_options_are_refused(make: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_rule_for_each_names_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"parameters\[0\] is a NoneType, not a tensor; leave it out"):
        adaptive.AdaGC().clip_([None])  # type: ignore[list-item]


def test_kl_clip_refuses_before_it_writes() -> None:
    params = ones((2,), (3,))
    first = torch.full((2,), 1e6)
    for second, error in (
        (torch.ones(1).expand(3), ValueError),
        (torch.ones(3).to_sparse(), TypeError),
        (torch.ones(3, dtype=torch.int64), TypeError),
    ):
        with pytest.raises(error, match=r"preconditioned\[1\] is (expanded|torch.int64)|parameter 1 has a sparse"):
            adaptive.kl_clip_(params, [first, second], 1e-3, 1.0)
        assert first[0] == 1e6


def trained(rule: adaptive.AdaptiveRule, *shapes: tuple[int, ...]) -> dict[str, Any]:
    rule.clip_(ones(*(shapes or ((2,), (3,)))))
    return rule.state_dict()


@pytest.mark.parametrize(
    ("saved", "into", "says"),
    [
        (adaptive.ZClip(), adaptive.AutoClip(), "this is the state of 'ZClip' .*, not of AutoClip"),
        (adaptive.AutoClip(window=5), adaptive.AutoClip(window=6), "saved with window=5; this one has window=6"),
        (adaptive.AutoClip(window=5), adaptive.AutoClip(), "saved with window=5; this one has window=None"),
        (adaptive.AutoClip(), adaptive.AutoClip(window=1024), "saved with window=None; this one has window=1024"),
    ],
)
def test_the_state_of_another_method_is_refused(
    saved: adaptive.AdaptiveRule, into: adaptive.AdaptiveRule, says: str
) -> None:
    state = trained(saved)
    with pytest.raises(ValueError, match=says):
        into.load_state_dict(state)
    with pytest.raises(ValueError, match="takes what its state_dict returned"):
        into.load_state_dict({"a": 1})


def test_a_state_that_lacks_entries_is_refused() -> None:
    rule = adaptive.ZClip()
    state = trained(rule)
    del state["state"]["var"]
    with pytest.raises(ValueError, match="this ZClip state has other entries: mean, count"):
        rule.load_state_dict(state)


def test_other_parameters_are_refused() -> None:
    rule = adaptive.AdaGC()
    state = trained(rule, (2,), (3,))
    params = ones((2,), (4,))
    with pytest.raises(ValueError, match="a state for each of 2 parameters, in order, and these 2 are others"):
        rule.clip_(params)
    assert torch.equal(params[0].grad, torch.ones(2))  # type: ignore[arg-type]
    other = adaptive.AdaGC()
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="these 1 are others"):
        other.clip_(ones((2,)))


def test_a_renamed_parameter_is_named() -> None:
    rule, other, params = adaptive.EMAClip(1.1), adaptive.EMAClip(1.1), ones((2,), (3,))
    rule.bind(params, ["a.weight", "b.weight"])
    rule.clip_(params)
    other.load_state_dict(rule.state_dict())
    with pytest.raises(ValueError, match=r"'b.weight' is not there any more and 'c.weight' was not there then"):
        other.bind(params, ["a.weight", "c.weight"])
    with pytest.raises(ValueError, match="in another order"):
        other.bind(params, ["b.weight", "a.weight"])


def test_what_an_optimizer_cannot_do() -> None:
    params = ones((2,), (3,))
    plain = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="SkipSpikes needs an Adam, AdamW, SGD or Adagrad with fused=True"):
        clip_on_step(plain, adaptive.SkipSpikes())
    fused = torch.optim.SGD(params, lr=0.1, fused=True)
    with pytest.raises(ValueError, match="AdaGC has one for each; leave defer at None"):
        clip_on_step(fused, adaptive.AdaGC(), defer=True)
    groups = torch.optim.SGD([{"params": params[:1], "max_norm": 1.0}, {"params": params[1:]}], lr=0.1)
    with pytest.raises(ValueError, match="AdaGC clips each gradient by itself, and a param group has a max_norm"):
        clip_on_step(groups, adaptive.AdaGC())
    groups.param_groups[0]["max_norm"] = adaptive.ZClip()
    clip_on_step(groups, 1.0)
    with pytest.raises(TypeError, match=r'param_groups\[0\]\["max_norm"\] must be a number'):
        groups.step()


def test_sparse_rows_are_refused() -> None:
    params = ones((2,), (3, 3))
    params[1].grad = torch.eye(3).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of parameter 1 is torch\.sparse_coo; AGC wants dense ones"):
        adaptive.adaptive_clip_grad_(params)
    assert torch.equal(params[0].grad, torch.ones(2))  # type: ignore[arg-type]
