"""What calls cost in memory: no copy of a gradient, nothing left by calls that raise; a gradient of 2^31 elements."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedclip

from .conftest import Engine, engines, parameters

MIB, GIB = 1 << 20, 1 << 30
PROC = Path("/proc/self")
linux = pytest.mark.skipif(not (PROC / "clear_refs").exists(), reason="no /proc to read the memory of a process from")


def told(file: Path, name: str) -> int:
    """A number of bytes from one of Linux's tables."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    return told(PROC / "status", "VmRSS")


def with_peak(call: Callable[[], object]) -> int:
    """Bytes by which memory in use rises on the way."""
    (PROC / "clear_refs").write_text("5")  # the peak begins anew
    before = resident()
    call()
    return told(PROC / "status", "VmHWM") - before


CALLS: dict[str, Callable[[list[Tensor]], object]] = {
    "clip_grad_norm_": lambda params: fusedclip.clip_grad_norm_(params, 1.0),
    "error_if_nonfinite": lambda params: fusedclip.clip_grad_norm_(params, 1.0, error_if_nonfinite=True),
    "clip_grad_value_": lambda params: fusedclip.clip_grad_value_(params, 0.5),
    "clip_grad_norm_with_stats_": lambda params: fusedclip.clip_grad_norm_with_stats_(params, 1.0),
    "clip_grad_norm_per_tensor_": lambda params: fusedclip.clip_grad_norm_per_tensor_(params, 1.0),
    "clip_grad_norm_scopes_": lambda params: fusedclip.clip_grad_norm_scopes_({"a": params[:1], "b": params[1:]}, 1.0),
}


@linux
@pytest.mark.parametrize("name", CALLS)
@engines("cpu", on="cpu")
def test_no_gradient_is_copied(engine: Engine, name: str) -> None:
    """256 MiB of gradients; a copy of one would be 64."""
    params = parameters([torch.ones(16 * MIB) for _ in range(4)])
    CALLS[name](params[:1])  # what torch loads and allocates once
    assert with_peak(lambda: CALLS[name](params)) < 2 * MIB
    assert with_peak(lambda: torch.ones(16 * MIB)) > 60 * MIB  # a copy would have been seen


def _raising() -> list[Callable[[], object]]:
    """Calls that raise after some of their work: while gathering, between the passes, before the write."""
    good = [torch.full((300,), 2.0) for _ in range(40)]
    whole = torch.full((64,), torch.nan)
    held = parameters(good)
    bad = torch.nn.Parameter(torch.ones(2, 3))
    bad.grad = torch.ones(2, 1).expand(2, 3)
    return [
        lambda: fusedclip.clip_grad_norm_([*held[:20], bad, *held[20:]], 1.0),
        lambda: fusedclip.clip_grad_norm_([*held[:20], None, *held[20:]], 1.0),  # type: ignore[list-item]
        lambda: fusedclip.clip_grad_norm_([*held, *parameters([whole])], 1.0, error_if_nonfinite=True),
        lambda: fusedclip.clip_grad_norm_scopes_({"a": held[:20], "b": [*held[20:], held[0]]}, 1.0),
        lambda: fusedclip.clip_grad_norm_per_tensor_(parameters([whole[:40], whole[20:]]), 1.0),
        lambda: fusedclip.clip_grad_value_([*held, bad], 1.0),
    ]


@linux
@engines("cpu", on="cpu")
def test_calls_that_raise_leave_nothing(engine: Engine) -> None:
    calls = _raising()

    def run(times: int) -> None:
        for number in range(times):
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                calls[number % len(calls)]()

    def growth() -> int:
        gc.collect()
        before, objects = resident(), len(gc.get_objects())
        run(10_000)
        gc.collect()
        assert len(gc.get_objects()) - objects < 100
        return resident() - before

    run(1000)
    # 50 bytes a call. A leak shows both times; what the allocator keeps in a process with a long history, once.
    assert any(growth() < MIB // 2 for _ in range(2))


def _available() -> int:
    table = Path("/proc/meminfo")
    return told(table, "MemAvailable") if table.exists() else 0


@pytest.mark.skipif(_available() < 8 * GIB, reason="less than 8 GiB of memory are free")
@engines("cpu", on="cpu")
def test_a_gradient_beyond_2_to_the_31(engine: Engine) -> None:
    count = 2**31 + 8
    grad = torch.zeros(count, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**31 - 1, 2**31, count - 1])
    grad[places] = 4.0
    params = parameters([grad])
    assert fusedclip.clip_grad_norm_(params, 2.0) == 8
    assert grad[places].tolist() == [1.0] * 4
    fusedclip.clip_grad_value_(params, 0.5)
    assert grad[places].tolist() == [0.5] * 4
    stats = fusedclip.get_grad_stats([grad]).total
    assert (stats.zeros, stats.abs_sum, stats.norm) == (count - 4, 2.0, 1.0)
