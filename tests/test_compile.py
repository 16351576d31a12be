"""torch.compile: operators where gradients are plain and dense, one graph break where they are not."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
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


def same(got: object, want: object) -> None:
    """Of results with the same fields: the same bits."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    elif isinstance(want, dict):
        assert isinstance(got, dict)
        assert list(got) == list(want)
        same(list(got.values()), list(want.values()))
    elif isinstance(want, list | tuple):
        assert isinstance(got, list | tuple)
        for one, other in zip(got, want, strict=True):
            same(one, other)
    elif hasattr(want, "__dataclass_fields__"):
        assert type(got) is type(want)
        same(*([getattr(stats, name) for name in want.__dataclass_fields__] for stats in (got, want)))
    else:
        assert got == want


def held(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


Call = Callable[[list[Tensor]], object]
OWN: dict[str, Call] = {
    "clip_grad_norm_": lambda params: fusedclip.clip_grad_norm_(params, 1.0),
    "clip_grad_norm_, an iterator": lambda params: fusedclip.clip_grad_norm_(iter(params), 1, "inf"),
    "clip_grad_norm_, a tensor as limit": lambda params: fusedclip.clip_grad_norm_(params, torch.tensor(1.0), 3.0),
    "on_nonfinite": lambda params: fusedclip.clip_grad_norm_(params, 0.0, on_nonfinite="zero"),
    "get_total_norm": lambda params: fusedclip.get_total_norm(held(params)),
    "clip_grads_with_norm_": lambda params: fusedclip.clip_grads_with_norm_(params, 1.0, 10),
    "clip_grad_value_": lambda params: fusedclip.clip_grad_value_(params, 2.0),
    "get_per_tensor_norms": lambda params: fusedclip.get_per_tensor_norms(held(params) * 2),
    "get_grad_stats": lambda params: fusedclip.get_grad_stats(held(params) * 2, 1.0),
    "clip_grad_norm_with_stats_": lambda params: fusedclip.clip_grad_norm_with_stats_(params, 1.0),
    "clip_grad_norm_per_tensor_": lambda params: fusedclip.clip_grad_norm_per_tensor_(params, 1.0),
    "clip_grad_norm_scopes_": lambda params: fusedclip.clip_grad_norm_scopes_(
        {"first": params[:1], "rest": params[1:]}, {"first": 1.0, "rest": None}
    ),
}
KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "plain": gradients,
    "one has none": lambda: [*parameters([None]), *gradients()],
    "listed twice": lambda: gradients() * 2,
    "two in one memory": lambda: parameters([(shared := torch.tensor([3.0, 4.0])), shared.view(2, 1)]),
    "mixed dtypes": lambda: parameters(
        [torch.tensor([3.0, 9.0], dtype=dtype) for dtype in (torch.bfloat16, torch.double)]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_in_one_graph_as_eager(name: str, kind: str) -> None:
    if name == "clip_grad_norm_scopes_" and kind != "mixed dtypes":
        pytest.skip("a scope without a gradient, or with another's, is for the function itself")
    call, params, eager = OWN[name], KINDS[kind](), KINDS[kind]()
    compiler = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor) -> tuple[Tensor, object]:
        before = x * 2
        return before + 1, call(params)

    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    for _ in range(3):
        if kind == "plain":
            refill(params)
            refill(eager)
        same(compiled(torch.ones(2)), (torch.full((2,), 3.0), call(eager)))
        same(held(params), held(eager))
    assert compiler.frame_count == 1


def test_a_compiled_training_step() -> None:
    """Clip and update in one graph of Inductor's, the limit changing, as eager."""
    torch.manual_seed(0)
    data, weights = torch.randn(5, 4), []
    for compiles in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer, compiler = torch.optim.SGD(model.parameters(), lr=0.1), CompileCounterWithBackend("inductor")

        def update(limit: float, model: torch.nn.Module = model, optimizer: torch.optim.SGD = optimizer) -> Tensor:
            norm = fusedclip.clip_grad_norm_(model.parameters(), limit)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data.add_(parameter.grad, alpha=-0.1)
            return norm

        run = torch.compile(update, backend=compiler, fullgraph=True) if compiles else update
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own
            for step in range(6):
                optimizer.zero_grad(set_to_none=False)
                model(data).square().sum().backward()
                norm = run(0.5 / (step + 1))
        weights.append([norm, *(parameter.detach() for parameter in model.parameters())])
        assert not compiles or compiler.frame_count == 2  # the second for any number
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("limit", [-1.0, float("nan"), torch.tensor(-1.0), "much"])
def test_bad_limits_are_refused_as_by_eager(limit: Any) -> None:
    params = gradients()
    with pytest.raises((TypeError, ValueError), match=r"max_norm (must be|is)"):
        torch.compile(lambda: fusedclip.clip_grad_norm_(params, limit), backend="aot_eager")()
    same(held(params), held(gradients()))


def _odd(make: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [*parameters([make(torch.tensor([[3.0, 1.0], [0.0, 4.0]]))]), *gradients()]


RULE = fusedclip.adaptive.ZClip()
ODD: dict[str, tuple[Callable[[], list[Tensor]], Call]] = {
    "error_if_nonfinite": (gradients, lambda params: fusedclip.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)),
    "no gradient": (lambda: parameters([None]), OWN["clip_grad_norm_"]),
    "sparse": (_odd(Tensor.to_sparse), OWN["clip_grad_norm_"]),
    "strided": (_odd(lambda g: g[:, :1]), OWN["clip_grad_norm_per_tensor_"]),
    "complex": (_odd(lambda g: torch.complex(g, g)), OWN["get_grad_stats"]),
    "an empty scope": (lambda: [*parameters([None]), *gradients()], OWN["clip_grad_norm_scopes_"]),
    "an adaptive rule": (gradients, lambda params: RULE.clip_(params)),
    "block RMS": (gradients, lambda params: fusedclip.adaptive.clip_by_block_rms_(params, 1.0)),
}


@pytest.mark.parametrize("name", ODD)
def test_what_no_operator_takes_is_one_graph_break_and_no_second_compilation(name: str) -> None:
    make, call = ODD[name]
    params, eager, compiler = make(), make(), CompileCounter()

    def step(x: Tensor) -> Tensor:
        before = x * 2
        call(params)
        return before + 1

    compiled = torch.compile(step, backend=compiler)
    for _ in range(3):
        assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
        call(eager)
        same(held(params), held(eager))
        assert compiler.frame_count == 2  # what is before the call, and what is after it
    assert len(counters["graph_break"]) == 1
    assert not counters["unimplemented"]


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
    with pytest.raises(Exception, match=r"(?s)fusedclip reads the gradients' memory"):
        torch.compile(ODD["error_if_nonfinite"][1], backend="eager", fullgraph=True)(params)


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


@pytest.mark.parametrize("kind", ["plain", "complex", "strided"])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"])
def test_patched_functions_compile_whole(name: str, kind: str) -> None:
    """With an operator of ours, or as torch's own."""
    if (name, kind) == ("clip_grad_value_", "complex"):
        pytest.skip("torch's clip_grad_value_ takes no complex gradients")
    make = gradients if kind == "plain" else ODD[kind][0]
    calls: dict[str, Call] = {
        "clip_grad_norm_": lambda params: clip_grad_norm_((p for p in params), 1.0),
        "get_total_norm": lambda params: get_total_norm(held(params)),
        "clip_grads_with_norm_": lambda params: clip_grads_with_norm_(params, 1.0, torch.tensor(5.0)),
        "clip_grad_value_": lambda params: clip_grad_value_(params, 1.0),
    }
    results, graphs = [], []
    for patched in (False, True):
        torch._dynamo.reset()
        params, seen = make(), []

        def backend(graph: torch.fx.GraphModule, _: object, seen: list[str] = seen) -> torch.fx.GraphModule:
            seen.append(graph.code)
            return graph

        with fusedclip.patch_torch() if patched else nullcontext():
            compiled = torch.compile(lambda params=params: calls[name](params), backend=backend, fullgraph=True)
            run = compiled if patched or kind != "plain" else lambda params=params: calls[name](params)
            try:
                results.append([run(), run(), *held(params)])
            except torch._dynamo.exc.Unsupported:
                if patched:
                    raise
                pytest.skip(f"torch {torch.__version__} cannot compile its own function whole")
        graphs.append(seen)
    assert len(graphs[1]) == 1
    assert ("ops.fusedclip" in graphs[1][0]) == (kind == "plain")
    torch.testing.assert_close(*results)
