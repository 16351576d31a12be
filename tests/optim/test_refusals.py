"""Steps and options that are refused: in words that name the way out, and with nothing changed."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fusedclip import backends
from fusedclip.optim import SGD, AdamW

from ..conftest import Engine, engines
from .test_steps import snapshot


def sparse() -> Parameter:
    p = Parameter(torch.zeros(3, 2))
    p.grad = torch.eye(3, 2).to_sparse()
    return p


def complex_() -> Parameter:
    p = Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    return p


def of_another_shape() -> Parameter:
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    p.data = torch.zeros(4)
    return p


def expanded() -> Parameter:
    p = Parameter(torch.ones(1).expand(3))
    p.grad = torch.ones(3)
    return p


def float8() -> Parameter:
    p = Parameter(torch.ones(3).to(torch.float8_e4m3fn))
    p.grad = torch.ones(3).to(torch.float8_e4m3fn)
    return p


@engines("cpu", "cuda", "triton", "reference", on="cpu")
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("kind", [AdamW, functools.partial(SGD, momentum=0.9)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (sparse, "SparseAdam"),
        (complex_, "view_as_real"),
        (of_another_shape, "gradient or state of shape"),
        (expanded, r"is expanded: .*\.clone\(\) it first"),
        (float8, "optimizers move bfloat16"),
    ],
)
def test_a_failed_step_changes_nothing(
    engine: Engine, bad: Callable[[], Parameter], words: str, kind: Callable[..., Any], max_norm: float | None
) -> None:
    good = [Parameter(torch.ones(4)), Parameter(torch.ones(5))]
    for p in good:
        p.grad = torch.ones_like(p)
    optimizer = kind(good, max_norm=max_norm)
    optimizer.step()
    optimizer.add_param_group({"params": [bad()]})
    before = snapshot(optimizer)[:2]
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()
    versions = [p._version for p in good]
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()
    assert [p._version for p in good] == versions
    for (p, grad, state), parameter in zip(before, good, strict=True):
        assert torch.equal(parameter, p)
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)
        for name, value in state.items():
            assert torch.equal(optimizer.state[parameter][name], value)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_meta_parameters_are_refused(max_norm: float | None) -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))
    for p in (good, bad):
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="to_empty"):
        AdamW([good, bad], max_norm=max_norm).step()
    assert torch.equal(good, torch.ones(3))


def test_parameters_that_share_memory_are_refused() -> None:
    whole = torch.ones(10)
    ps = [Parameter(whole[:6]), Parameter(whole[4:])]
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="share memory"):
        AdamW(ps).step()
    assert torch.equal(whole, torch.ones(10))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1"),
        ({"eps": -1.0}, "eps is -1"),
        ({"max_norm": -1.0}, "max_norm is -1"),
        ({"moments": torch.float16}, "squares of small gradients vanish"),
        ({"master": "half"}, "master must be"),
        ({"on_nonfinite": "skip"}, "max_norm=inf measures"),
        ({"on_nonfinite": "zero", "max_norm": 1.0}, "on_nonfinite must be"),
    ],
    ids=str,
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW([Parameter(torch.ones(3))], **options)
    with pytest.raises(ValueError, match="fp16"):
        AdamW([Parameter(torch.ones(3, dtype=torch.float16))], master="split")
    with pytest.raises(ValueError, match="nesterov"):
        SGD([Parameter(torch.ones(3))], nesterov=True)


def test_an_engine_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = next(b for b in backends.ORDER if b.name == "reference")
    monkeypatch.setattr(reference, "updater", None)
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with backends.use("reference"), pytest.raises(RuntimeError, match="it has no kernels for optimizers"):
        AdamW([p]).step()
