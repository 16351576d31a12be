"""What a step promises: torch's numbers, one limit or several, nothing read, nothing written but what moves."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedclip.optim import SGD, AdamW

from ..clip_on_step.optimizers import assert_same, closure_for, give_gradients, held, pair
from ..conftest import Engine, engines
from ..host_reads import host_reads

KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"amsgrad": True, "maximize": True, "betas": (0.2, 0.9)}),
    (SGD, torch.optim.SGD, {}),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
]
kinds = pytest.mark.parametrize(("kind", "torchs", "options"), KINDS, ids=str)


def two(kind: Any, torchs: Any, options: dict[str, Any], **own: Any) -> tuple[Any, Any]:
    """Ours and torch's, with equal parameters in two groups."""
    return pair(kind, **options, **own)[0], pair(torchs, **options)[0]


def snapshot(optimizer: Optimizer) -> list[Any]:
    return copy.deepcopy([[p.detach(), p.grad, optimizer.state.get(p, {})] for p in held(optimizer)])


def assert_unchanged(optimizer: Optimizer, before: list[Any]) -> None:
    for (p, grad, state), parameter in zip(before, held(optimizer), strict=True):
        torch.testing.assert_close(parameter.detach(), p, rtol=0, atol=0, equal_nan=True)
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)
        for name, value in state.items():
            torch.testing.assert_close(optimizer.state[parameter][name], value, rtol=0, atol=0, equal_nan=True)


@engines("cpu", "cuda", "triton", "reference", on="cpu")
@kinds
@pytest.mark.parametrize("max_norm", [None, 0.3, 1e9])
def test_as_torchs_clip_and_step(
    engine: Engine, kind: Any, torchs: Any, options: dict[str, Any], max_norm: float | None
) -> None:
    ours, theirs = two(kind, torchs, options, max_norm=max_norm)
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        held(ours)[step % 4].grad = held(theirs)[step % 4].grad = None  # steps are counted for each by itself
        before = [None if p.grad is None else p.grad.clone() for p in held(ours)]
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(held(theirs), max_norm)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        for p, grad in zip(held(ours), before, strict=True):
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)  # type: ignore[arg-type]
        if max_norm is not None:
            torch.testing.assert_close(ours.total_norm, norm)
            torch.testing.assert_close(ours.clip_coef, (max_norm / (norm + 1e-6)).clamp(max=1))
        else:
            assert ours.total_norm is None


@engines("cpu", "cuda", "triton", "reference", on="cpu")
@pytest.mark.parametrize("together", [None, 0.3])
def test_a_group_with_a_limit_of_its_own(engine: Engine, together: float | None) -> None:
    ours, theirs = two(AdamW, torch.optim.AdamW, {}, max_norm=together)
    ours.param_groups[1]["max_norm"] = torch.tensor(0.2)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        norms = [nn.utils.clip_grad_norm_(held(theirs)[:2], math.inf if together is None else together)]
        norms += [nn.utils.clip_grad_norm_(held(theirs)[2:], 0.2)]
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        torch.testing.assert_close(ours.group_norms, {1: norms[1]})
        if together is None:
            assert ours.total_norm is None
        else:
            torch.testing.assert_close(ours.total_norm, norms[0])


def test_infinity_measures() -> None:
    ours, theirs = two(AdamW, torch.optim.AdamW, {}, max_norm=math.inf)
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    assert ours.total_norm > 0
    assert ours.clip_coef == 1


@engines("cpu", "cuda", "triton", "reference", on="cpu")
@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_leaves_everything(engine: Engine, kind: Any, torchs: Any, options: dict[str, Any], bad: float) -> None:
    ours, theirs = two(kind, torchs, options, max_norm=1.0, on_nonfinite="skip")
    for step in range(4):
        give_gradients(ours, theirs, seed=step, bad=bad if step in (0, 2) else None)
        before = snapshot(ours)
        ours.step()
        if step in (0, 2):
            assert_unchanged(ours, before)
            continue
        nn.utils.clip_grad_norm_(held(theirs), 1.0)
        theirs.step()
        assert_same(ours, theirs)


@kinds
@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_under_a_grad_scaler(
    kind: Any, torchs: Any, options: dict[str, Any], max_norm: float | None, unscaled_before: bool
) -> None:
    ours, theirs = two(kind, torchs, options, max_norm=max_norm)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for step in range(5):
        give_gradients(ours, theirs, seed=step, bad=math.inf if step in (0, 3) else None)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.zeros(()))
            torch._foreach_mul_([p.grad for p in held(optimizer) if p.grad is not None], scaler.get_scale())
            if unscaled_before or optimizer is theirs:
                scaler.unscale_(optimizer)
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(held(theirs), max_norm)
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert_same(ours, theirs)
        if max_norm is not None and step not in (0, 3):
            torch.testing.assert_close(ours.total_norm, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", ["propagate", "skip"])
@pytest.mark.parametrize("kind", [AdamW, functools.partial(SGD, momentum=0.9, dampening=0.5)], ids=["AdamW", "SGD"])
def test_the_host_reads_no_tensor(kind: Callable[..., Optimizer], skip: str, dtype: torch.dtype) -> None:
    parameters = [Parameter(torch.randn(n).to(dtype)) for n in (10, 70001)]
    for p in parameters:
        p.grad = torch.randn(p.shape).to(dtype)
    optimizer = kind(parameters, max_norm=1.0, on_nonfinite=skip, master="fp32")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())  # type: ignore[attr-defined]
    with host_reads() as reads:
        optimizer.step()
        optimizer.step()
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            generator = torch.Generator().manual_seed(0)
            ps = [Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (1, 300_001, 70_000, 5)]
            optimizer = AdamW(ps, max_norm=1.0, moments=torch.bfloat16)
            for _ in range(3):
                for p in ps:
                    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                optimizer.step()
            results.append([p.detach() for p in ps])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "torchs", "options"), [k for k in KINDS if "maximize" not in k[2]], ids=str)
def test_a_closure(kind: Any, torchs: Any, options: dict[str, Any]) -> None:
    ours, theirs = two(kind, torchs, options, max_norm=0.3)
    for _ in range(3):
        losses = [o.step(closure_for(o, clip)) for o, clip in ((ours, False), (theirs, True))]
        torch.testing.assert_close(*losses)
    assert_same(ours, theirs)


def test_schedulers_and_a_learning_rate_that_is_a_tensor() -> None:
    ours = AdamW([Parameter(torch.ones(5))], lr=torch.tensor(0.1))
    theirs = torch.optim.AdamW([Parameter(torch.ones(5))], lr=torch.tensor(0.1), fused=True)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, total_iters=4) for o in (ours, theirs)]
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert_same(ours, theirs)


def layouts() -> list[tuple[Tensor, Tensor]]:
    """Parameters and gradients that do not lie in memory in the same order."""
    conv = torch.randn(4, 3, 5, 5)
    return [
        (conv.clone(), conv.contiguous(memory_format=torch.channels_last)),
        (conv.contiguous(memory_format=torch.channels_last), conv.clone()),
        (torch.randn(8, 6)[::2, ::3], torch.randn(4, 2)),
        (torch.randn(6, 4).t(), torch.randn(4, 6)),
        (torch.randn(3, 4), torch.randn(3, 1).expand(3, 4)),
        (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)),
    ]


@engines("cpu", "cuda", "triton", "reference", on="cpu")
def test_any_order_of_memory(engine: Engine) -> None:
    torch.manual_seed(0)
    made = layouts()
    ours, theirs = (
        kind([Parameter(p.clone(memory_format=torch.preserve_format)) for p, _ in made])
        for kind in (AdamW, torch.optim.AdamW)
    )
    for optimizer in (ours, theirs):
        held(optimizer)[2].data = made[2][0].clone().repeat(2, 3)[::2, ::3]  # still with gaps
        for p, (_, gradient) in zip(held(optimizer), made, strict=True):
            p.grad = gradient
    for _ in range(3):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_autograd_knows_what_was_written() -> None:
    p = Parameter(torch.ones(3))
    optimizer = AdamW([p], max_norm=1.0)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_under_compile() -> None:
    ours, theirs = two(AdamW, AdamW, {"max_norm": 0.3})
    give_gradients(ours, theirs)
    torch.compile(lambda: ours.step(), backend="eager")()
    theirs.step()
    assert_same(ours, theirs)
