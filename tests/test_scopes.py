"""clip_grad_norm_scopes_: each set of gradients by itself, although one pass reads them all."""

import math

import pytest
import torch

import fusedclip
from fusedclip import backends

from .conftest import Engine, copies, parameters

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def lists(engine: Engine) -> dict[str, list[torch.Tensor]]:
    return {
        "dense": [engine.randn(n, dtype=FLOATING[i % 4], seed=i) for i, n in enumerate((3, 70_001, 64, 500))],
        "expert": [engine.randn(90, seed=7)[::2], engine.randn(0), torch.complex(engine.randn(5), engine.randn(5))],
        "matrices": [engine.randn(40, 30, seed=9).t()],
        "frozen": [],
    }


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf, 0.0])
@pytest.mark.parametrize("limits", [0.5, {"dense": 0.5, "expert": 1e9, "matrices": None, "frozen": 1.0}])
def test_each_scope_is_clipped_by_itself(engine: Engine, p: float, limits: object) -> None:
    together, alone = lists(engine), lists(engine)
    norms = fusedclip.clip_grad_norm_scopes_({k: parameters(v) for k, v in together.items()}, limits, p)  # type: ignore[arg-type]
    assert list(norms) == list(together)
    for name, grads in alone.items():
        limit = limits[name] if isinstance(limits, dict) else limits
        norm = fusedclip.clip_grad_norm_(parameters(grads), math.inf if limit is None else limit, p)  # type: ignore[arg-type]
        assert norms[name].dtype == norm.dtype
        torch.testing.assert_close(norms[name], norm.to(norms[name].device), rtol=3e-6, atol=0)
        for got, want in zip(together[name], grads, strict=True):
            rtol = 1e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7)


def test_one_read_and_one_write(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(next(backend for backend in backends.ORDER if backend.name == engine.name))
    calls: list[str] = []
    for name in ("lift", "scale_"):
        original = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *a, o=original, n=name, **k: calls.append(n) or o(*a, **k))
    fusedclip.clip_grad_norm_scopes_({k: parameters(v) for k, v in lists(engine).items()}, 0.1)
    assert calls == ["lift", "scale_"]


def test_a_device_limit_and_zeros(engine: Engine) -> None:
    grads = {"one": [engine.tensor([math.inf, 1.0])], "two": [engine.tensor([3.0, 4.0])]}
    limits = {"one": 1.0, "two": engine.tensor(1.0)}
    norms = fusedclip.clip_grad_norm_scopes_({k: parameters(v) for k, v in grads.items()}, limits, on_nonfinite="zero")
    assert (norms["one"], norms["two"]) == (math.inf, 5)
    assert (grads["one"][0] == 0).all()
    torch.testing.assert_close(grads["two"][0], engine.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_errors_leave_everything_as_it_was(engine: Engine) -> None:
    grads = [engine.tensor([3.0]), engine.tensor([4.0]), engine.tensor([math.nan])]
    before = copies(grads)
    one, two, bad = parameters(grads)
    twin = torch.nn.Parameter(engine.tensor([1.0]))
    twin.grad = grads[0]
    (expanded,) = parameters([engine.tensor([1.0]).expand(3)])
    clip = fusedclip.clip_grad_norm_scopes_
    for scopes, limits, error, message in (
        ({"a": [one], "b": [two, one]}, 1.0, ValueError, r"in the scopes 'a' and 'b': entry 1 of the second"),
        ({"a": [one], "b": [twin]}, 1.0, ValueError, r"belongs to two"),
        ({"a": [one], "b": [two]}, {"a": 1.0}, KeyError, r"max_norm has no entry for 'b'"),
        ({"a": [one]}, {"a": 1.0, "c": 1.0}, KeyError, r"scopes has none, for 'c'"),
        ({"a": [one], "b": [two]}, {"a": 1.0, "b": -1.0}, ValueError, r"max_norm\['b'\] is -1"),
        ([one, two], 1.0, TypeError, r"scopes must map names to parameters"),
        ({"a": one, "b": [expanded]}, 0.5, RuntimeError, r"parameters\[1\]\.grad.*is expanded"),
    ):
        with pytest.raises(error, match=message):
            clip(scopes, limits)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"parameters\[2\]\.grad \(nan\)"):
        clip({"a": [one], "b": [two, bad]}, 0.5, error_if_nonfinite=True)
    assert all(torch.equal(g.nan_to_num(7), b.nan_to_num(7)) for g, b in zip(grads, before, strict=True))
    assert clip({}, 1.0) == {}
    assert clip({"a": [torch.nn.Parameter(engine.tensor([1.0]))], "b": []}, 1.0) == {"a": 0, "b": 0}
