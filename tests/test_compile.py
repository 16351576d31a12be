"""torch.compile: fusedclip's own functions are one graph break, under patch_torch() torch's stay in the graph."""

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import fusedclip
from fusedclip import torch_internals

from .conftest import parameters


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch._dynamo.reset()


def gradients() -> list[Tensor]:
    return parameters([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])])


def refill(params: list[Tensor]) -> None:
    for parameter, gradient in zip(params, gradients(), strict=True):
        assert parameter.grad is not None
        assert gradient.grad is not None
        parameter.grad.copy_(gradient.grad)


OWN: dict[str, tuple[Callable[[list[Tensor]], object], list[float]]] = {
    "clip_grad_norm_": (lambda params: fusedclip.clip_grad_norm_(params, 1.0), [0.6, 0.8]),
    "get_total_norm": (lambda params: fusedclip.get_total_norm(params), [3.0, 4.0]),
    "clip_grads_with_norm_": (lambda params: fusedclip.clip_grads_with_norm_(params, 1.0, 10.0), [0.3, 0.4]),
    "clip_grad_value_": (lambda params: fusedclip.clip_grad_value_(params, 2.0), [2.0, 2.0]),
    "get_per_tensor_norms": (lambda params: fusedclip.get_per_tensor_norms(params), [3.0, 4.0]),
    "get_grad_stats": (lambda params: fusedclip.get_grad_stats(params), [3.0, 4.0]),
    "clip_grad_norm_with_stats_": (lambda params: fusedclip.clip_grad_norm_with_stats_(params, 1.0), [0.6, 0.8]),
    "clip_grad_norm_per_tensor_": (lambda params: fusedclip.clip_grad_norm_per_tensor_(params, 1.0), [1.0, 1.0]),
}


@pytest.mark.parametrize("name", OWN)
def test_one_graph_break_and_no_second_compilation(name: str) -> None:
    call, expected = OWN[name]
    params, compiler = gradients(), CompileCounter()

    def step(x: Tensor) -> Tensor:
        before = x * 2
        call(params)
        return before + 1

    compiled = torch.compile(step, backend=compiler)
    for _ in range(3):
        refill(params)
        assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
        clipped = torch.stack([params[0].grad[0], params[1].grad[1]])  # type: ignore[index]
        torch.testing.assert_close(clipped, torch.tensor(expected))
        assert compiler.frame_count == 2  # what is before the call, and what is after it
    assert len(counters["graph_break"]) == 1
    assert "fusedclip reads the gradients' memory" in next(iter(counters["graph_break"]))
    assert not counters["unimplemented"]


def test_the_norm_goes_into_the_next_graph() -> None:
    params, compiler = gradients(), CompileCounter()
    compiled = torch.compile(lambda: fusedclip.clip_grad_norm_(params, 1.0) * 2, backend=compiler)
    assert compiled() == 10
    torch.testing.assert_close(compiled(), torch.tensor(2.0))  # they are clipped by now
    assert compiler.frame_count == 1


def test_parameters_made_inside() -> None:
    """dynamo cannot take a generator across a graph break and runs such a frame as it is."""
    linear = torch.nn.Linear(2, 1, bias=False)
    compiled = torch.compile(lambda: fusedclip.clip_grad_norm_(linear.parameters(), 1.0) * 2, backend="eager")
    linear.weight.grad = torch.tensor([[3.0, 4.0]])
    assert compiled() == 10


def test_unscale_and_clip_is_one_graph_break() -> None:
    params, compiler = gradients(), CompileCounter()
    scaler, optimizer = fusedclip.amp.GradScaler("cpu", init_scale=2.0), torch.optim.SGD(params, lr=0.0)
    scaler.scale(torch.ones(()))

    def step(x: Tensor) -> Tensor:
        before = x * 2
        scaler.unscale_and_clip_grad_norm_(optimizer, 1.0)
        return before + 1

    compiled = torch.compile(step, backend=compiler)
    for _ in range(2):
        refill(params)
        compiled(torch.ones(2))
        torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.0]))
        scaler.step(optimizer)
        scaler.update()
    assert compiler.frame_count == 2
    assert len(counters["graph_break"]) == 1


def test_fullgraph_is_refused_in_clear_words() -> None:
    params = gradients()
    with pytest.raises(Exception, match=r"(?s)clip_grad_norm_.*fusedclip reads the gradients' memory"):
        torch.compile(lambda: fusedclip.clip_grad_norm_(params, 1.0), backend="eager", fullgraph=True)()


def test_a_compiled_step_is_clipped_before_its_graph() -> None:
    params, compiler = gradients(), CompileCounter()
    optimizer = torch.optim.SGD(params, lr=1.0)
    handle = fusedclip.optim.clip_on_step(optimizer, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its profiler hook
        compiled = torch.compile(lambda: optimizer.step(), backend=compiler)
        for _ in range(3):
            refill(params)
            with torch.no_grad():
                params[0].zero_()
            compiled()
            assert handle.total_norm == 5
            torch.testing.assert_close(params[0].detach(), torch.tensor([-0.6, 0.0]))
            assert compiler.frame_count == 1
    assert len(counters["graph_break"]) == 1


def test_a_handle_goes_without_the_garbage_collector() -> None:
    """A wrapper around the method, kept on its instance, would be a reference cycle."""
    gc.collect()
    gc.disable()
    try:
        optimizer = torch.optim.SGD(gradients(), lr=1.0)
        handle = fusedclip.optim.clip_on_step(optimizer, 1.0)
        optimizer.step()
        handle.remove()
        watch = weakref.ref(handle)
        del handle
        assert watch() is None
    finally:
        gc.enable()


class _Clipper:
    """As an owner of a hook would use the decorator: on the method, with no wrapper per instance."""

    def __init__(self) -> None:
        self.calls = 0

    @torch_internals.outside_graphs
    def clip(self, params: list[Tensor]) -> Tensor:
        self.calls += 1
        return _helper(params)


def _helper(params: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros(()) for _ in params]).sum()


def test_nothing_below_a_marked_function_is_compiled() -> None:
    clipper, params, compiler = _Clipper(), gradients(), CompileCounter()
    compiled = torch.compile(lambda x: clipper.clip(params) + x, backend=compiler)
    assert compiled(torch.ones(())) == 1
    assert (compiler.frame_count, compiler.op_count, clipper.calls) == (1, 1, 1)
    assert torch.compile(clipper.clip, backend=compiler)(params) == 0
    assert compiler.frame_count == 1


def test_a_torch_without_the_private_names_still_gives_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "_SKIP", None)

    @torch_internals.outside_graphs
    def clip(params: list[Tensor]) -> Tensor:
        return _helper(params)

    compiler, params = CompileCounter(), gradients()
    compiled = torch.compile(lambda x: clip(params) + x, backend=compiler)
    assert compiled(torch.ones(())) == 1
    assert compiler.frame_count == 2  # dynamo's frame hook has compiled it by itself


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"])
def test_patched_functions_compile_as_torchs_own(name: str) -> None:
    params = gradients()
    grads = [p.grad for p in params if p.grad is not None]
    calls: dict[str, Callable[[], object]] = {
        "clip_grad_norm_": lambda: clip_grad_norm_((p for p in params), 1.0),
        "get_total_norm": lambda: get_total_norm(grads),
        "clip_grads_with_norm_": lambda: clip_grads_with_norm_(params, 1.0, torch.tensor(5.0)),
        "clip_grad_value_": lambda: clip_grad_value_(params, 1.0),
    }
    results, graphs = [], []
    for patched in (False, True):
        torch._dynamo.reset()
        compiler = CompileCounter()
        compiled = torch.compile(calls[name], backend=compiler, fullgraph=True)
        patch = fusedclip.patch_torch() if patched else None
        try:
            for _ in range(2):
                refill(params)
                results.append((compiled(), [g.tolist() for g in grads]))
        finally:
            if patch is not None:
                patch.remove()
        graphs.append((compiler.frame_count, compiler.op_count))
    assert graphs[0] == graphs[1]
    assert graphs[0][0] == 1
    assert all(result == results[0] for result in results)


def test_importing_fusedclip_does_not_import_dynamo() -> None:
    code = "import torch, sys; import fusedclip; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
