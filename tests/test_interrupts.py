"""A call that ends late leaves no gradient half done: an interrupt during the compiled pass, copies that cannot be
written home."""

import _thread
import math
import signal
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedclip
from fusedclip import backends, passes
from fusedclip.gradients import Batch, Gradients
from fusedclip.gradients.layouts import Flat
from fusedclip.interrupts import all_or_none

from .conftest import Engine, copies, engines, parameters


@pytest.fixture
def heard() -> Iterator[None]:
    """A shell's background jobs are started deaf to Ctrl-C, and so are the tests in them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A Ctrl-C arrives during each first pass of the engine that writes."""
    cls = type(next(backend for backend in backends.ORDER if backend.name == engine.name))
    once = [True]

    def interrupted(name: str) -> Any:
        original = getattr(cls, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if once and (not name.endswith("list_") or args[-1]):  # a list left to others was not written
                once.clear()
                # What the interpreter does when the compiled call comes back: its result never gets to the caller.
                raise KeyboardInterrupt
            return result

        return call

    for name in ("scale_", "clamp_", "clip_", "clip_list_", "scale_list_"):
        monkeypatch.setattr(cls, name, interrupted(name))
    return engine


CALLS = [
    lambda ps: fusedclip.clip_grad_norm_(ps, 0.5),
    lambda ps: fusedclip.clip_grad_norm_(ps, 0.5, error_if_nonfinite=True),
    lambda ps: fusedclip.clip_grads_with_norm_(ps, 0.5, 2.0),
    lambda ps: fusedclip.clip_grad_value_(ps, 0.1),
    lambda ps: fusedclip.clip_grad_norm_per_tensor_(ps, 0.5),
]


def mixed(engine: Engine) -> list[torch.Tensor]:
    return [
        engine.randn(100),
        engine.randn(60, seed=1)[::2],
        engine.randn(20, seed=2, dtype=torch.float64),
        torch.sparse_coo_tensor([[1, 5, 1]], engine.randn(3, 4), (9, 4), check_invariants=True, device=engine.device),
    ]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kinds", [slice(0, 1), slice(0, 4)])
def test_what_follows_the_write_happens_all_the_same(interrupting: Engine, call: Any, kinds: slice) -> None:
    interrupted, whole = mixed(interrupting)[kinds], mixed(interrupting)[kinds]
    versions = [g._version for g in interrupted]
    with pytest.raises(KeyboardInterrupt):
        call(parameters(interrupted))
    call(parameters(whole))
    for got, want, version in zip(interrupted, whole, versions, strict=True):
        assert torch.equal(got.to_dense(), want.to_dense())
        assert got._version > version


def test_the_scaler_knows_that_the_gradients_are_unscaled(interrupting: Engine) -> None:
    for bad in (1.0, math.inf):
        weight = torch.nn.Parameter(torch.zeros(3, device=interrupting.device))
        weight.grad = interrupting.tensor([4.0, 8.0, bad])
        scaler = torch.amp.GradScaler(interrupting.device, init_scale=4.0)
        scaler.scale(torch.zeros((), device=interrupting.device))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        try:
            fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf)
        except KeyboardInterrupt:
            assert bad == 1.0  # the first
        scaler.step(optimizer)
        expected = [-1.0, -2.0, -0.25] if bad == 1.0 else [0.0, 0.0, 0.0]
        assert weight.tolist() == expected


@pytest.mark.usefixtures("heard")
def test_a_real_interrupt_during_the_compiled_call() -> None:
    """_thread.interrupt_main is what Ctrl-C does; it is raised at the latest when the compiled call comes back."""
    grads = [torch.full((2_000_000,), 2.0), torch.full((4,), 2.0)[::2]]
    versions = [g._version for g in grads]

    class Interrupting(torch.nn.Parameter):
        @property
        def grad(self) -> torch.Tensor:
            return grads[0]

    holders = [Interrupting(torch.zeros(1)), *parameters(grads[1:])]
    original = torch.get_num_threads
    armed = []

    def arming() -> int:  # the engine's last Python call before the compiled one
        if not armed:
            armed.append(True)
            _thread.interrupt_main()
        return original()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", arming)
        with pytest.raises(KeyboardInterrupt):
            fusedclip.clip_grad_norm_(holders, 1.0)
    halved = [bool((g < 2).all()) for g in grads]
    assert halved[0] == halved[1], "one is scaled and the other is not"
    assert [g._version > v for g, v in zip(grads, versions, strict=True)] == halved


def inference_mode_gradients(engine: Engine) -> torch.Tensor:
    with torch.inference_mode():
        return engine.randn(20, seed=3)[::2]


def awkward_subclass(engine: Engine) -> torch.Tensor:
    class Awkward(torch.Tensor):
        def copy_(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no writing here")

    return engine.randn(20, seed=3)[::2].as_subclass(Awkward)


@pytest.mark.parametrize("make", [inference_mode_gradients, awkward_subclass])
@pytest.mark.parametrize("call", CALLS)
def test_strided_gradients_that_torch_would_not_write(engine: Engine, make: Any, call: Any) -> None:
    """They are written with the others, or nothing is; here they are."""
    awkward = make(engine)
    grads = [engine.randn(50), awkward]
    plain = [copies(grads)[0], awkward.detach().as_subclass(torch.Tensor).clone()]
    call(parameters(grads))
    call(parameters(plain))
    for got, want in zip(grads, plain, strict=True):
        assert torch.equal(got.as_subclass(torch.Tensor), want)


def once(function: Any) -> Any:
    """The function, interrupted before it does anything the first time."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("call", CALLS)
def test_bringing_copies_home_is_not_cut_short(engine: Engine, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, whole = ([engine.randn(60, seed=i)[::2] for i in range(3)] for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(Flat, "bring_home", once(Flat.bring_home))
        with pytest.raises(KeyboardInterrupt):
            call(parameters(interrupted))
    call(parameters(whole))
    assert all(torch.equal(a, b) for a, b in zip(interrupted, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["found_inf", "increment_version"])
def test_noting_the_write_is_not_cut_short(dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    weight.grad = torch.tensor([4.0, 8.0], dtype=dtype)
    version = weight.grad._version
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(passes, where, once(getattr(passes, where)))
        with pytest.raises(KeyboardInterrupt):
            fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf)
    assert weight.grad._version > version
    scaler.step(optimizer)
    assert weight.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_just_before_the_compiled_call(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the engine has written nothing, or is asked again: never half of the list."""
    engine = Engine("cpu", "cpu")
    interrupted, whole = mixed(engine), mixed(engine)
    before = [g.to_dense().clone() for g in interrupted]
    with monkeypatch.context() as patch, backends.use("cpu"):
        patch.setattr(torch, "get_num_threads", once(torch.get_num_threads))
        with pytest.raises(KeyboardInterrupt):
            call(parameters(interrupted))
    call(parameters(whole))
    untouched = [torch.equal(g.to_dense(), b) for g, b in zip(interrupted, before, strict=True)]
    same = [torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(interrupted, whole, strict=True)]
    assert all(untouched) or all(same)


def test_a_scaler_that_was_interrupted_before_the_write_unscales_later(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([4.0, 8.0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with monkeypatch.context() as patch, backends.use("cpu"):
        patch.setattr(torch, "get_num_threads", once(torch.get_num_threads))
        with pytest.raises(KeyboardInterrupt):
            fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf)
    assert weight.grad.tolist() == [4.0, 8.0]
    fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf)
    assert weight.grad.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("small", [0, 1])
def test_lists_on_several_devices_are_brought_to_their_end(interrupting: Engine, small: int) -> None:
    """Two batches, as two devices make them, of which one needs no write: all is written, or nothing has begun."""
    grads = [interrupting.tensor([3.0, 4.0]), interrupting.tensor([5.0])]
    grads[small].mul_(0.01)
    before = copies(grads)
    batches = [Batch([grad], grad.device) for grad in grads]
    gathered = Gradients(batches, SimpleNamespace(sources=[0, 1]), "grad", is_double=False)
    with pytest.raises(KeyboardInterrupt):
        passes.clamp_(gathered, 1.0)
    untouched = all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    assert all((grad <= 1).all() for grad in grads) or (small == 0 and untouched)


@pytest.mark.parametrize("line", range(20))
def test_between_two_parts_an_interrupt_leaves_out_none(line: int) -> None:
    """It arrives at each line of what does the parts, some of which come three times."""
    done: list[int] = []
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code is not all_or_none.__code__:
            return None
        seen += event == "line"
        if event == "line" and seen == line + 1:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        all_or_none([(partial(done.append, part), partial(done.__contains__, part)) for part in range(3)])
    except KeyboardInterrupt:
        assert seen == line + 1
    finally:
        sys.settrace(before)
    assert done in ([0, 1, 2], [] if line < 6 else [0, 1, 2])


def interrupted_at(stage: int, call: Any, held: Any) -> bool:
    """Whether as many of our functions begin in that call; the last of them begins with an interrupt."""
    begun = 0

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal begun
        begun += "fusedclip" in frame.f_code.co_filename
        if begun == stage:
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        call(held)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("call", CALLS)
@engines("cpu")
def test_an_interrupt_as_a_function_begins(engine: Engine, call: Any) -> None:
    """Where the interpreter raises one, too."""
    for stage in count(1):
        grads = mixed(engine)
        before, versions = copies(grads), [g._version for g in grads]
        interrupted = interrupted_at(stage, call, parameters(grads))
        changed = [not torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(grads, before, strict=True)]
        assert all(changed) or not any(changed)
        assert [g._version > v for g, v in zip(grads, versions, strict=True)] == changed
        if not interrupted:
            break
    assert stage > 10
    assert all(changed)


def test_the_scaler_and_an_interrupt_as_a_function_begins() -> None:
    for stage in count(1):
        weight = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.tensor([4.0, 8.0, 1.0])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        interrupted = interrupted_at(
            stage, partial(fusedclip.amp.unscale_and_clip_grad_norm_, scaler, optimizer), math.inf
        )
        scaler.step(optimizer)  # which unscales what has not been
        assert weight.tolist() == [-1.0, -2.0, -0.25]
        if not interrupted:
            break
    assert stage > 10


def test_an_optimizer_and_an_interrupt_as_a_function_begins() -> None:
    for stage in count(1):
        params = [torch.nn.Parameter(torch.ones(4, 5)) for _ in range(3)]
        for param in params:
            param.grad = torch.ones(4, 5)
        params[2].grad = torch.ones(5, 4).t()  # the reference moves this one
        versions = [param._version for param in params]
        interrupted = interrupted_at(stage, lambda made: made.step(), fusedclip.optim.AdamW(params, max_norm=1.0))
        moved = [bool((param != 1).all()) for param in params]
        assert all(moved) or not any((param != 1).any() for param in params)
        assert [param._version > version for param, version in zip(params, versions, strict=True)] == moved
        if not interrupted:
            break
    assert stage > 10
    assert all(moved)
