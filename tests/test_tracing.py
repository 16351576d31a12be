"""What records operators (torch.jit.trace, make_fx, FakeTensorMode) would keep a norm as a constant: it is refused."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fusedclip

from .conftest import parameters

Call = Callable[[list[Tensor]], object]


def _step(params: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(params, lr=0.0)
    fusedclip.optim.clip_on_step(optimizer, 1.0)
    optimizer.step()


def _unscale(params: list[Tensor]) -> None:
    scaler, optimizer = fusedclip.amp.GradScaler("cpu", init_scale=2.0), torch.optim.SGD(params, lr=0.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_and_clip_grad_norm_(optimizer, 1.0)


CALLS: dict[str, Call] = {
    "clip_grad_norm_": lambda params: fusedclip.clip_grad_norm_(params, 1.0),
    "get_total_norm": lambda params: fusedclip.get_total_norm([p.grad for p in params if p.grad is not None]),
    "clip_grads_with_norm_": lambda params: fusedclip.clip_grads_with_norm_(params, 1.0, 9.0),
    "clip_grad_value_": lambda params: fusedclip.clip_grad_value_(params, 1.0),
    "get_per_tensor_norms": lambda params: fusedclip.get_per_tensor_norms(
        [p.grad for p in params if p.grad is not None]
    ),
    "get_grad_stats": lambda params: fusedclip.get_grad_stats([p.grad for p in params if p.grad is not None]),
    "clip_grad_norm_with_stats_": lambda params: fusedclip.clip_grad_norm_with_stats_(params, 1.0),
    "clip_grad_norm_per_tensor_": lambda params: fusedclip.clip_grad_norm_per_tensor_(params, 1.0),
    "unscale_and_clip_grad_norm_": _unscale,
    "clip_on_step": _step,
}


def _jit(call: Callable[[Tensor], Tensor]) -> None:
    torch.jit.trace(call, (torch.ones(2),), check_trace=False)


def _fx(**options: Any) -> Callable[[Callable[[Tensor], Tensor]], None]:
    return lambda call: make_fx(call, **options)(torch.ones(2))  # type: ignore[no-any-return]


TRACERS = {
    "torch.jit.trace": _jit,
    "make_fx": _fx(),
    "make_fx, pre_dispatch": _fx(pre_dispatch=True),
    "make_fx, fake": _fx(tracing_mode="fake"),
    "make_fx, symbolic": _fx(tracing_mode="symbolic"),
}


@contextmanager
def _refused(under: str) -> Iterator[None]:
    with pytest.raises(NotImplementedError, match=re.escape(f"cannot run under {under}")):
        yield


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", CALLS)
def test_a_tracer_is_refused_and_nothing_written(tracer: str, name: str) -> None:
    params = parameters([torch.tensor([3.0, 4.0])])

    def traced(x: Tensor) -> Tensor:
        CALLS[name](params)
        return x * 2

    with _refused(tracer.partition(",")[0]):
        TRACERS[tracer](traced)
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [3.0, 4.0]
    CALLS[name](params)  # and all is well again afterwards


@pytest.mark.parametrize("name", CALLS)
def test_fake_gradients(name: str) -> None:
    with FakeTensorMode():
        params = parameters([torch.ones(3), torch.ones(2)])
        with _refused("a FakeTensorMode"):
            CALLS[name](params)
    with pytest.raises(TypeError, match="FakeTensor"):
        fusedclip.clip_grad_norm_(params, 1.0)


def test_a_mode_that_only_watches_does_not_matter() -> None:
    params = parameters([torch.tensor([3.0, 4.0])])
    with FlopCounterMode(display=False):
        assert fusedclip.clip_grad_norm_(params, 1.0) == 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "make_fx"])
def test_patched_functions_are_traced_as_torchs_own(tracer: str) -> None:
    params = parameters([torch.ones(2)])

    def clipped_gradient(gradient: Tensor) -> Tensor:
        params[0].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(iter(params), 1.0)
        return params[0].grad

    example, other = torch.ones(2), torch.tensor([3.0, 4.0])
    with fusedclip.patch_torch():
        if tracer == "make_fx":
            traced = make_fx(clipped_gradient)(example)
        else:
            traced = torch.jit.trace(clipped_gradient, (example,), check_trace=False)
    torch.testing.assert_close(traced(other), torch.tensor([0.6, 0.8]))


def test_patched_functions_take_fake_gradients() -> None:
    with FakeTensorMode(), fusedclip.patch_torch():
        norm = torch.nn.utils.clip_grad_norm_(parameters([torch.ones(3)]), 1.0)
    assert norm.shape == ()
