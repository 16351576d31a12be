"""clip_on_step: every optimizer and way against torch's calls, and that nothing stays behind on the optimizer."""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from fusedclip import amp, backends
from fusedclip.optim import ClipOnStep, clip_on_step

from . import oracle, tiny_gpt
from .conftest import parameters
from .host_reads import host_reads
from .two_ranks import on_two_ranks

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 1e-2},
    "Adagrad": {"lr": 0.05},
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3},
    "Adamax": {"lr": 3e-3},
    "Muon": {"lr": 1e-2},
    "NAdam": {"lr": 3e-3},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
FUSED_KINDS = [(Adam, {}), (AdamW, {}), (SGD, {}), (SGD, {"momentum": 0.9, "nesterov": True}), (Adagrad, {})]
MAX_NORM = 2.2  # for the tiny GPT: clips some steps, not all
# How far parameters may be apart after 200 steps, relative to the largest: 1e-7 for most; SGD with momentum is the most
# chaotic with 3e-5 in fp32 and 5e-14 in fp64.
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-11}


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    assert classes - {"Optimizer", "SparseAdam", "LBFGS"} == set(OPTIMIZERS)  # those two have tests of their own


# --- 200 steps of a small GPT ----------------------------------------------------------------------------------------


def train(name: str, way: str, dtype: torch.dtype, fused: bool | None) -> tuple[list[float], Tensor, list[float]]:
    """Scales, final parameters and norms. `way`: torch, amp, or when the scaler unscales and `defer`."""
    gpt = tiny_gpt.model(dtype)
    trained = [p for p in gpt.parameters() if name != "Muon" or p.ndim == 2]
    extra = {} if fused is None else {"fused": fused}
    optimizer = getattr(torch.optim, name)(trained, **OPTIMIZERS[name], **extra)
    scaler = amp.GradScaler("cpu", init_scale=1024.0, growth_interval=17)
    norms: list[float] = []
    when, _, defer = way.partition(" ")
    if defer:
        handle = clip_on_step(optimizer, MAX_NORM, defer={"None": None, "False": False, "True": True}[defer])

    def clip() -> None:
        if when in ("torch", "before"):
            scaler.unscale_(optimizer)
        if when == "torch":
            norms.append(nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        elif when == "amp":
            norms.append(scaler.unscale_and_clip_grad_norm_(optimizer, MAX_NORM).item())

    scales = tiny_gpt.train(gpt, optimizer, scaler, clip, 200, planted=frozenset({2, 40, 41, 120}))
    assert not defer or handle.total_norm is not None
    return scales, torch.cat([p.detach().flatten() for p in trained]), norms


@functools.cache
def torchs(name: str, dtype: torch.dtype) -> tuple[list[float], Tensor, list[float]]:
    return train(name, "torch", dtype, None)


def assert_trains_alike(name: str, way: str, dtype: torch.dtype, fused: bool | None, bound: float) -> None:
    scales, values, _ = train(name, way, dtype, fused)
    expected_scales, expected, norms = torchs(name, dtype)
    assert scales == expected_scales
    assert len(set(scales)) > 5
    assert 10 < sum(norm > MAX_NORM for norm in norms if math.isfinite(norm)) < 199
    error = (values - expected).abs().max() / expected.abs().max()
    assert error <= bound, error


@pytest.mark.parametrize("way", ["amp", "around False", "before None"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    # Muon orthogonalises in bf16, which makes a rounding difference in fp32 a visible one.
    [(name, dtype) for name in OPTIMIZERS for dtype in DTYPES if (name, dtype) != ("Muon", torch.float32)],
)
def test_200_steps(name: str, way: str, dtype: torch.dtype) -> None:
    assert_trains_alike(name, way, dtype, None, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "way", ["amp", *(f"{when} {defer}" for when in ("around", "before") for defer in ("None", "False", "True"))]
)
@pytest.mark.parametrize("name", FUSED)
def test_200_steps_fused(name: str, way: str, dtype: torch.dtype) -> None:
    # A deferred coefficient is rounded to fp32, in which torch's kernels take it.
    bound = 1e-4 if way.endswith("True") else DTYPES[dtype]
    assert_trains_alike(name, way, dtype, True, bound)


# --- without a scaler ------------------------------------------------------------------------------------------------


def pair(kind: Callable[..., Optimizer], **options: Any) -> tuple[Optimizer, Optimizer]:
    """Two optimizers with equal parameters, in two groups of which one has lr 0.2."""

    def make() -> Optimizer:
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
        return kind([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.2}], lr=0.1, **options)

    return make(), make()


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(*optimizers: Optimizer, seed: int = 0, bad: float | None = None) -> None:
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for p in held(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        if bad is not None:
            held(optimizer)[1].grad[2, 2] = bad


def assert_same(ours: Optimizer, theirs: Optimizer) -> None:
    for a, b in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", FUSED_KINDS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0, math.inf])
def test_steps_and_what_the_handle_says(
    kind: tuple[type, dict[str, Any]], fused: bool, defer: bool | None, max_norm: float
) -> None:
    ours, theirs = pair(kind[0], fused=fused, **kind[1])
    if defer and not fused:
        with pytest.raises(ValueError, match=r"defer=True needs an Adam.* with fused=True"):
            clip_on_step(ours, max_norm, defer=True)
        return
    handle = clip_on_step(ours, max_norm, defer=defer)
    assert handle.total_norm is None
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        norm = nn.utils.clip_grad_norm_(held(theirs), max_norm)
        ours.step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, norm)
        torch.testing.assert_close(handle.clip_coef, (max_norm / (norm + 1e-6)).clamp(max=1))
        for a, b in zip(held(ours), held(theirs), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=1e-7)
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", FUSED_KINDS, ids=str)
@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("p", [2.0, 0.0, 3.0])
@pytest.mark.parametrize("first_bad", [0, 2])
def test_skip(
    kind: tuple[type, dict[str, Any]], defer: bool | None, bad: float, p: float, first_bad: int, fill: None
) -> None:
    """A step with a NaN or an inf leaves parameters and state as they were, the first one included."""
    ours, theirs = pair(kind[0], fused=True, **kind[1])
    handle = clip_on_step(ours, 0.5, p, on_nonfinite="skip", defer=defer)
    for step in range(5):
        is_bad = step in (first_bad, first_bad + 1)
        give_gradients(ours, theirs, seed=step, bad=bad if is_bad else None)
        before = copy.deepcopy(held(ours)) if is_bad else None
        ours.step()
        if is_bad:
            assert p == 0 or not handle.total_norm.isfinite()
            if before is not None:
                assert all(torch.equal(a, b) for a, b in zip(held(ours), before, strict=True))
        else:
            nn.utils.clip_grad_norm_(held(theirs), 0.5, p)
            theirs.step()
    assert_same(ours, theirs)
    for mine, other in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(ours.state[mine], theirs.state[other], rtol=2e-6, atol=1e-7)


@pytest.fixture
def fill() -> Any:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_propagate_steps_as_torch_does() -> None:
    for defer in (False, True):
        ours, theirs = pair(AdamW, fused=True)
        clip_on_step(ours, 0.5, defer=defer)
        give_gradients(ours, theirs, bad=math.inf)
        nn.utils.clip_grad_norm_(held(theirs), 0.5)
        ours.step()
        theirs.step()
        for a, b in zip(held(ours), held(theirs), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    def made(kind: type = SGD, **options: Any) -> Optimizer:
        return kind(parameters([torch.ones(3)]), lr=0.1, **options)

    with pytest.raises(ValueError, match=r"on_nonfinite='skip' needs an Adam.*this RMSprop has none"):
        clip_on_step(made(torch.optim.RMSprop), 1.0, on_nonfinite="skip")
    with pytest.raises(ValueError, match=r"momentum and dampening: a skipped first step"):
        clip_on_step(made(fused=True, momentum=0.9, dampening=0.1), 1.0, on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite must be"):
        clip_on_step(made(), 1.0, on_nonfinite="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_norm is -1"):
        clip_on_step(made(), -1.0)
    with pytest.raises(ValueError, match="norm_type is NaN"):
        clip_on_step(made(), 1.0, math.nan)
    with pytest.raises(TypeError, match=r"got Linear; if that wraps one"):
        clip_on_step(nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    grouped = SGD([{"params": parameters([torch.ones(3)]), "max_norm": 1.0}], fused=True)
    with pytest.raises(ValueError, match=r"defer=True hands .* one coefficient"):
        clip_on_step(grouped, 1.0, defer=True)
    twice = made()
    handle = clip_on_step(twice, 1.0)
    with pytest.raises(ValueError, match="clips on step already"):
        clip_on_step(twice, 1.0)
    handle.remove()
    clip_on_step(twice, 1.0)

    class Unscaling(SGD):
        def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
            raise AssertionError

    unscaling = made(Unscaling)
    clip_on_step(unscaling, 1.0)
    with pytest.raises(RuntimeError, match="unscale_and_clip_grad_norm_"):
        unscaling.step(grad_scaler=object())


# --- param groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_groups_own_max_norm(fused: bool, with_scaler: bool) -> None:
    ours, theirs = pair(AdamW, fused=fused)
    ours.param_groups[1]["max_norm"] = 0.25
    ours.param_groups[0]["max_norm"] = None
    handle = clip_on_step(ours, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        if with_scaler:
            for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
                scaler.scale(torch.zeros(()))
                torch._foreach_mul_([p.grad for p in held(optimizer)], scaler.get_scale())
            scalers[1].unscale_(theirs)
        rest = nn.utils.clip_grad_norm_(theirs.param_groups[0]["params"], 0.5)
        own = nn.utils.clip_grad_norm_(theirs.param_groups[1]["params"], 0.25)
        if with_scaler:
            scalers[0].step(ours)
            for scaler in scalers:
                scaler.update()
        else:
            ours.step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, rest)
        torch.testing.assert_close(handle.group_norms, {1: own})
    assert_same(ours, theirs)


def test_a_failed_clip_changes_no_gradient_and_steps_nothing() -> None:
    ours, _ = pair(AdamW)
    ours.param_groups[0]["max_norm"] = 0.1
    clip_on_step(ours, 0.1)
    give_gradients(ours)
    held(ours)[3].grad = torch.ones(1).expand(4, 3)
    before = copy.deepcopy([(p.detach(), p.grad) for p in held(ours)])
    with pytest.raises(RuntimeError, match="is expanded"):
        ours.step()
    for p, (value, grad) in zip(held(ours), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)


# --- nothing stays behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
def test_nothing_stays_on_the_optimizer(fails: bool, with_closure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, fresh = pair(AdamW, fused=True)
    give_gradients(ours, fresh)
    fresh.step()
    handle = clip_on_step(ours, 0.1, defer=True, on_nonfinite="skip")
    seen = []

    def failing(*args: Any, **kwargs: Any) -> None:
        seen.append((kwargs["grad_scale"], kwargs["found_inf"]))
        raise MemoryError

    if fails:
        monkeypatch.setattr(torch, "_fused_adamw_", failing)
        with pytest.raises(MemoryError):
            ours.step(*[lambda: 1.0] * with_closure)
        assert seen[0][0] > 1
        assert seen[0][1] == 0
    else:
        assert ours.step(*[lambda: 1.0] * with_closure) == (1.0 if with_closure else None)
    assert vars(ours).keys() == vars(fresh).keys()
    assert ours.state_dict().keys() == fresh.state_dict().keys()
    assert ours.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]
    handle.remove()
    handle.remove()
    assert not ours._optimizer_step_pre_hooks
    assert not ours._optimizer_step_post_hooks


def test_removed_it_no_longer_clips() -> None:
    ours, theirs = pair(SGD)
    clip_on_step(ours, 0.1).remove()
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_a_step_that_calls_its_parents_clips_once_and_sees_itself() -> None:
    class Counting(AdamW):
        calls = 0
        optimizer = "another one"

        def step(self, closure: Any = None) -> Any:
            type(self).calls += 1
            self.passing = 1
            del self.passing
            assert self.optimizer == "another one"  # wrappers of an optimizer keep it under this name
            assert self is ours or self is theirs  # no stand-in
            return self.really(closure)

        def really(self, closure: Any) -> Any:
            return super().step(closure)

    pair(AdamW)  # torch hooks AdamW.step as well now: our hook runs twice in a step
    ours, theirs = pair(Counting, fused=True)
    handle = clip_on_step(ours, 0.1)
    for _ in range(2):
        give_gradients(ours, theirs)
        norm = nn.utils.clip_grad_norm_(held(theirs), 0.1)
        ours.step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, norm)
    assert Counting.calls == 4
    assert_same(ours, theirs)


@pytest.mark.parametrize("asked", [{"defer": True}, {"on_nonfinite": "skip"}])
def test_subclasses_of_fused_optimizers_may_do_anything_and_are_only_scaled(asked: dict[str, Any]) -> None:
    class Own(SGD):
        pass

    ours, _ = pair(Own, fused=True)
    with pytest.raises(ValueError, match="this Own has none"):
        clip_on_step(ours, 0.1, **asked)


def test_a_step_that_raised_does_not_count_as_under_way() -> None:
    class Failing(SGD):
        fail = True

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise KeyError
            return super().step(closure)

    ours, theirs = pair(Failing)
    clip_on_step(ours, 0.1)
    give_gradients(ours, theirs)
    with pytest.raises(KeyError):
        ours.step()
    Failing.fail = theirs.fail = False
    give_gradients(ours, theirs)
    nn.utils.clip_grad_norm_(held(theirs), 0.1)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_arguments_of_a_step_that_are_no_closures_arrive() -> None:
    seen = []

    class Scaled(SGD):
        def step(self, lr_scale: float, metrics: dict[str, int], closure: Any) -> Any:
            seen.append((lr_scale, metrics))
            return super().step(closure)

    ours, theirs = pair(Scaled)
    clip_on_step(ours, 0.1)

    def closure() -> float:
        give_gradients(ours, theirs)
        return 0.0

    ours.step(0.5, {"loss": 1}, closure)
    assert seen == [(0.5, {"loss": 1})]
    nn.utils.clip_grad_norm_(held(theirs), 0.1)
    theirs.step(0.5, {}, None)
    assert_same(ours, theirs)


def test_skip_under_a_scaler_that_found_no_gradients() -> None:
    ours, _ = pair(AdamW, fused=True)
    clip_on_step(ours, 0.1, on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for parameter in held(ours):
        parameter.grad = None
    scaler.unscale_(ours)
    with contextlib.suppress(AssertionError):  # torch's: no inf checks were recorded
        scaler.step(ours)
    ours.found_inf = 0  # what torch makes of no device at all
    ours.step()


def test_gradients_that_share_memory_are_divided_once() -> None:
    shared = torch.tensor([3.0, 4.0])
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for weight in weights:
        weight.grad = shared
    ours = SGD(weights, lr=1.0, fused=True)
    clip_on_step(ours, 1.0)
    ours.step()
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]), rtol=1e-5, atol=0)
    deferring = SGD(weights, lr=1.0, fused=True)
    clip_on_step(deferring, 1e-3, defer=True)
    with pytest.raises(ValueError, match="share the memory"):
        deferring.step()


def test_state_dict_scheduler_zero_grad_and_copies() -> None:
    ours, theirs = pair(AdamW, fused=True)
    handle = clip_on_step(ours, 0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (ours, theirs)]
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        nn.utils.clip_grad_norm_(held(theirs), 0.1)
        ours.step()
        theirs.step()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            scheduler.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
        assert held(ours)[0].grad is None
    assert_same(ours, theirs)
    assert not copy.deepcopy(ours)._optimizer_step_pre_hooks
    handle.remove()


# --- closures --------------------------------------------------------------------------------------------------------


def closure_for(optimizer: Optimizer, clip: bool) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**4).sum() for p in held(optimizer))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(held(optimizer), 0.3)
        return loss

    return closure


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("fused", "defer"), [(False, None), (True, None), (True, False), (True, True)])
def test_a_closures_gradients_are_clipped(by_name: bool, fused: bool, defer: bool | None) -> None:
    ours, theirs = pair(AdamW, fused=fused)
    clip_on_step(ours, 0.3, defer=defer)
    for _ in range(4):
        mine = closure_for(ours, clip=False)
        loss = ours.step(closure=mine) if by_name else ours.step(mine)
        torch.testing.assert_close(loss, theirs.step(closure_for(theirs, clip=True)))
        ours.step(None)
        nn.utils.clip_grad_norm_(held(theirs), 0.3)
        theirs.step()
    assert_same(ours, theirs)


def test_the_coefficient_belongs_to_whoever_reads_it() -> None:
    (held,) = parameters([torch.ones(3, dtype=torch.float64)])
    optimizer = torch.optim.SGD([held], lr=0.1)
    handle = clip_on_step(optimizer, 100.0)
    for _ in range(2):
        optimizer.step()
        assert handle.clip_coef == 1
        handle.clip_coef.zero_()
    assert torch.equal(held.grad, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_clips_at_every_evaluation(line_search: str | None) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64))]
        made.append(torch.optim.LBFGS(ps, lr=0.5, max_iter=5, line_search_fn=line_search))
    ours, theirs = made
    handle = clip_on_step(ours, 0.3)
    ours.step(closure_for(ours, clip=False))
    assert handle.clip_coef < 1
    theirs.step(closure_for(theirs, clip=True))
    for _ in range(3):
        ours.step(closure_for(ours, clip=False))
        theirs.step(closure_for(theirs, clip=True))
    torch.testing.assert_close(held(ours), held(theirs), rtol=1e-9, atol=1e-12)


def test_a_closure_that_raises_leaves_nothing_behind() -> None:
    ours, fresh = pair(AdamW, fused=True)
    handle = clip_on_step(ours, 0.3, defer=True)

    def closure() -> float:
        raise KeyError

    with pytest.raises(KeyError):
        ours.step(closure)
    assert vars(ours).keys() == vars(fresh).keys()
    assert handle.total_norm is None


# --- where else it has to work ---------------------------------------------------------------------------------------


def test_sparse_adam() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 3, sparse=True)
        optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        made.append((embedding, optimizer))
    (ours, clipped), (theirs, plain) = made
    clip_on_step(clipped, 0.5)
    for _ in range(3):
        for embedding, optimizer in made:
            optimizer.zero_grad()
            embedding(torch.tensor([1, 2, 2, 7])).square().sum().backward()
        dense = theirs.weight.grad.to_dense()
        theirs.weight.grad *= min(1.0, 0.5 / (dense.norm().item() + 1e-6))
        clipped.step()
        plain.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_reads_no_tensor(defer: bool | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the host looks at the coefficient, where that is free; with that look taken away none is left."""
    from fusedclip import optim

    monkeypatch.setattr(optim, "_seen_to_be_one", lambda coef: False)
    for skip in ("propagate", "skip"):
        grads = [torch.randn(n, dtype=dtype) for n in (10, 70001)]
        optimizer = AdamW(parameters(grads), fused=True)
        optimizer.step()
        clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite=skip)  # type: ignore[arg-type]
        with host_reads() as reads:
            optimizer.step()
        assert reads == []


def test_the_look_at_the_coefficient_is_for_the_cpu_alone() -> None:
    from fusedclip.optim import _seen_to_be_one

    assert _seen_to_be_one(torch.ones(()))
    assert not _seen_to_be_one(torch.tensor(0.5))
    assert not _seen_to_be_one(torch.ones((), device="meta"))


def test_every_engine(engine: Any) -> None:
    for defer in (False, True):
        grads = [engine.randn(n, seed=n) for n in (10, 70001)]
        optimizer = SGD(parameters(grads), lr=1.0, fused=True)
        handle = clip_on_step(optimizer, 0.5, defer=defer)
        for parameter in held(optimizer):
            nn.init.zeros_(parameter)
        given = [g.clone() for g in grads]
        with backends.use(engine.name):
            optimizer.step()
        oracle.assert_close(handle.total_norm, oracle.norm(given), 3e-6)
        for p, g in zip(held(optimizer), given, strict=True):
            torch.testing.assert_close(p.detach(), -g * handle.clip_coef, rtol=1e-5, atol=0)


def ranks_step_together(rank: int) -> None:
    for defer in (False, True):
        optimizer = SGD(parameters([torch.full((3,), 1.0 + rank)]), lr=0.1, fused=True)
        handle = clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite="skip", group=dist.group.WORLD)
        nn.init.zeros_(held(optimizer)[0])
        optimizer.step()
        expected = math.sqrt(15)
        oracle.assert_close(handle.total_norm, expected, 1e-6)
        torch.testing.assert_close(held(optimizer)[0].detach(), torch.full((3,), -0.1 * (1 + rank) / expected))
        before = held(optimizer)[0].detach().clone()
        held(optimizer)[0].grad = torch.tensor([1.0, math.inf if rank else 1.0, 2.0])
        optimizer.step()
        assert torch.equal(held(optimizer)[0], before)


def test_group() -> None:
    on_two_ranks(ranks_step_together)


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_step(fused: bool) -> None:
    """The clip runs before the graph; eager backend, since what is compiled is torch's own step."""
    torch._dynamo.reset()
    ours, theirs = pair(AdamW, fused=fused)
    handle = clip_on_step(ours, 0.1)
    step = torch.compile(ours.step, backend="eager")
    for i in range(3):
        give_gradients(ours, theirs, seed=i)
        norm = nn.utils.clip_grad_norm_(held(theirs), 0.1)
        step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, norm)
    for a, b in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # torch compiles its own step to other roundings
    handle.remove()
    refused = clip_on_step(theirs, 0.1, defer=True) if fused else None
    if refused is not None:
        with pytest.raises(RuntimeError, match="compiled step"):
            torch.compile(theirs.step, backend="eager")()
    torch._dynamo.reset()


def test_the_handle_is_a_clip_on_step() -> None:
    optimizer = SGD(parameters([torch.ones(3)]), lr=0.1)
    assert isinstance(clip_on_step(optimizer, 1.0), ClipOnStep)


# --- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("skip", ["propagate", "skip"])
def test_no_synchronisation_on_a_gpu(defer: bool | None, skip: Any) -> None:
    optimizer = AdamW(parameters([torch.randn(n, device="cuda") for n in (10, 70001)]), fused=True)
    clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite=skip)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("defer", [False, True])
def test_a_captured_step_clips_at_every_replay(defer: bool) -> None:
    grads = [torch.randn(n, device="cuda") for n in (10, 70001)]
    optimizer = AdamW(parameters(grads), lr=0.1, fused=True, capturable=True)
    handle = clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite="skip")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for size in (2.0, 0.001):
        for grad in grads:
            grad.fill_(size)
        graph.replay()
        oracle.assert_close(handle.total_norm, oracle.norm([torch.full_like(g, size) for g in grads]), 3e-6)
