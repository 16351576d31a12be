"""`python -m fusedclip check` names an engine that was broken on purpose, with the list and the call that show it."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedclip.__main__
from fusedclip import backends, check
from fusedclip.backends.cpu import Cpu
from fusedclip.gradients import Batch


def flip_a_coefficient(original: Any) -> Any:
    def scale_(self: Cpu, batch: Batch, coef: Tensor, *, zero: bool) -> Any:
        if coef.dim() and len(coef) > 1:
            coef = coef.clone()
            coef[1] *= -1
        return original(self, batch, coef, zero=zero)

    return scale_


def write_a_nan(original: Any) -> Any:
    def clamp_(self: Cpu, batch: Batch, bound: float) -> Any:
        written = original(self, batch, bound)
        batch.tensors[0].view(-1)[:1] = math.nan
        return written

    return clamp_


def lose_nan(original: Any) -> Any:
    return lambda self, batch, p: original(self, batch, p).nan_to_num(0.0)


def write_beside(original: Any) -> Any:
    """The element in memory before each gradient, which belongs to somebody else."""

    def clip_list_(self: Cpu, items: list[Tensor], *more: Any) -> Any:
        for item in items:
            if item.grad is not None and item.grad.storage_offset():
                item.grad.as_strided((1,), (1,), item.grad.storage_offset() - 1).fill_(3)
        return original(self, items, *more)

    return clip_list_


def round_the_norm(original: Any) -> Any:
    def clip_list_(self: Cpu, *arguments: Any) -> Any:
        found = original(self, *arguments)
        return found * (1 + 1e-5) if isinstance(found, Tensor) else found

    return clip_list_


def fail(original: Any) -> Any:
    def clip_(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("misaligned address")

    return clip_


BROKEN: list[tuple[str, Callable[[Any], Any], str]] = [
    ("scale_", flip_a_coefficient, "clip_grad_norm_per_tensor_: memory of gradient 1"),
    ("clamp_", write_a_nan, "clip_grad_value_: memory of gradient 0"),
    ("lift", lose_nan, "with nan: clip_grad_norm_scopes_: the result"),
    ("clip_list_", write_beside, "misaligned: clip_grad_norm_, p = 2: memory of gradient"),
    ("clip_list_", round_the_norm, "clip_grad_norm_, p = 2: the result"),
    ("clip_", fail, "unscale_and_clip_grad_norm_: RuntimeError: misaligned address"),
]


@pytest.mark.parametrize(("method", "breaking", "found"), BROKEN, ids=[breaking.__name__ for _, breaking, _ in BROKEN])
def test_a_broken_engine_is_named(
    method: str,
    breaking: Callable[[Any], Any],
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = [(name, grads) for name, grads in check.lists(torch.device("cpu")) if name.startswith("torch.float32")]
    monkeypatch.setattr(check, "lists", lambda device, interpreted: few)
    monkeypatch.setattr(Cpu, method, breaking(getattr(Cpu, method)))
    assert check.main() == 1
    shown = capsys.readouterr().out
    assert found in shown
    assert "cpu on cpu differs from the reference in" in shown


@pytest.mark.parametrize(
    ("got", "want"),
    [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.inf), (math.inf, -math.inf), (1e30, math.inf), (1e-30, 0.0)],
)
def test_what_is_different(got: float, want: float) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert check.difference(ones * want, ones * want) is None
    assert check.difference(ones * got, ones * want) is not None
    assert check.difference(ones.float(), ones) is not None
    assert check.difference(ones[:2], ones) is not None


@pytest.mark.parametrize("dtype", sorted(check.FLOATING, key=str))
def test_the_bound_is_a_rounding_and_the_norms_own(dtype: torch.dtype) -> None:
    want = torch.tensor([1.0, 2.0**-14], dtype=dtype)
    step = 1 + torch.finfo(dtype).eps
    assert check.difference(want * step, want) is None
    assert check.difference(want * max(1 + 3 * torch.finfo(dtype).eps, 1 + 1e-5), want) is not None


def test_nothing_to_compare_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends, "ORDER", backends.ORDER[-1:])
    assert check.main() == 0
    assert "no engine here to compare" in capsys.readouterr().out


def test_a_missing_cpu_engine_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Cpu, "missing", lambda self: "it did not load")
    monkeypatch.setattr(check, "lists", lambda device, interpreted: iter(()))
    assert check.main() == 1
    assert (
        "the cpu engine, which this machine should have, is not available: it did not load" in capsys.readouterr().out
    )


def test_the_command() -> None:
    command = [sys.executable, "-W", "error", "-m", "fusedclip", "check"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"fusedclip  {fusedclip.__version__}, torch {torch.__version__}" in shown.stdout
    assert "cpu        serves cpu" in shown.stdout
    assert "no backend is called" not in shown.stdout
    assert "check: cpu on cpu agrees with the reference" in shown.stdout


def test_a_command_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fusedclip", "chekc"])
    with pytest.raises(SystemExit) as ended:
        fusedclip.__main__.main()
    assert ended.value.code == 2
