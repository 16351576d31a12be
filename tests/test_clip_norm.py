"""clip_grad_norm_ against the fp64 answer, element by element, and against torch where torch is right."""

import math
import weakref
from contextlib import nullcontext

import pytest
import torch

import fusedclip

from . import oracle
from .conftest import Engine, copies, parameters

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.5, 0.0])
@pytest.mark.parametrize("fraction", [0.5, 1e-4])
def test_clipped_elements(engine: Engine, dtype: torch.dtype, p: float, fraction: float) -> None:
    grads = [engine.randn(n, dtype=dtype, seed=n) for n in (3, 64, 1000, 70001)]
    before = copies(grads)
    expected = oracle.norm(before, p)
    norm = fusedclip.clip_grad_norm_(parameters(grads), expected * fraction, p)
    oracle.assert_close(norm, expected, 3e-6)
    for after, b in zip(grads, before, strict=True):
        oracle.assert_scaled(after, b, oracle.coefficient(expected, expected * fraction), engine.ulps(dtype))


def test_constant_gradients_are_clipped_exactly(engine: Engine) -> None:
    grads = [torch.full((300_000,), 0.1, device=engine.device)]
    before = copies(grads)
    fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    if engine.name in ("cpu", "reference"):  # GPU engines sum floats: 3e-6 on the norm is their bound
        oracle.assert_scaled(grads[0], before[0], oracle.coefficient(oracle.norm(before), 1.0), 1.5)
    assert fusedclip.get_total_norm(grads) <= 1.0 + 3e-6


@pytest.mark.parametrize("dtype", FLOATING)
def test_norm_after_clipping_is_max_norm(engine: Engine, dtype: torch.dtype) -> None:
    grads = [engine.randn(5000, dtype=dtype, seed=i) for i in range(4)]
    fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    oracle.assert_close(
        fusedclip.get_total_norm(grads), 1.0, 2e-4 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    )


@pytest.mark.parametrize("dtype", FLOATING)
def test_not_clipped_is_untouched(engine: Engine, dtype: torch.dtype) -> None:
    grads = [engine.randn(n, dtype=dtype, seed=n) for n in (5, 70000)]
    before, versions = copies(grads), [g._version for g in grads]
    norm = fusedclip.clip_grad_norm_(parameters(grads), 1e6)
    oracle.assert_close(norm, oracle.norm(before), 3e-6)
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    if engine.host_knows:
        assert [g._version for g in grads] == versions  # nothing was written


def test_negative_zero_and_subnormals_survive(engine: Engine) -> None:
    grads = [engine.tensor([-0.0, 0.0, 1e-40, 2.0]), engine.tensor([1e-7, 6e-8, 3.0], torch.float16)]
    before = copies(grads)
    fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    assert math.copysign(1, grads[0][0]) == -1
    for after, b in zip(grads, before, strict=True):
        coef = oracle.coefficient(oracle.norm(before), 1.0)
        oracle.assert_scaled(after, b, coef, engine.ulps(b.dtype))


def test_autograd_sees_the_write(engine: Engine) -> None:
    grads = [engine.randn(10), engine.randn(70000)]
    versions = [g._version for g in grads]
    fusedclip.clip_grad_norm_(parameters(grads), 0.5)
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))


@pytest.mark.filterwarnings("ignore:Using backward. with create_graph=True")
def test_gradient_with_a_graph_can_be_clipped_but_not_reused(engine: Engine) -> None:
    x = torch.ones(3, device=engine.device, requires_grad=True)
    (x**3).sum().backward(create_graph=True)
    saved = x.grad.exp()  # saves its result, not x.grad
    square = x.grad * x.grad  # saves x.grad
    fusedclip.clip_grad_norm_([x], 0.1)
    saved.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("max_norm", [torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64), 0.5, "0.5"])
def test_max_norm_as_number_or_tensor(engine: Engine, max_norm: object) -> None:
    grads = [engine.randn(100)]
    before = copies(grads)
    fusedclip.clip_grad_norm_(parameters(grads), max_norm.to(engine.device) if torch.is_tensor(max_norm) else max_norm)
    oracle.assert_scaled(grads[0], before[0], oracle.coefficient(oracle.norm(before), 0.5), 1.5)


def test_max_norm_zero_gives_zeros(engine: Engine) -> None:
    grads = [engine.randn(100)]
    fusedclip.clip_grad_norm_(parameters(grads), 0)
    assert (grads[0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_max_norm_inf_measures_and_never_writes(engine: Engine, bad: float) -> None:
    for limit in (math.inf, engine.tensor(math.inf)):
        grads = [engine.tensor([1.0, bad, 2.0])]
        before = copies(grads)
        norm = fusedclip.clip_grad_norm_(parameters(grads), limit, on_nonfinite="zero")
        oracle.assert_close(norm, oracle.norm(before), 1e-6)
        assert torch.equal(grads[0].nan_to_num(7), before[0].nan_to_num(7))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf, -math.inf, 0.0, 0.5, "inf"])
@pytest.mark.parametrize("max_norm", [0.7, 1e5])
def test_agrees_with_torch(engine: Engine, p: float, max_norm: float) -> None:
    ours, theirs = ([engine.randn(n, seed=n) for n in (2, 30, 400)] for _ in range(2))
    norm = fusedclip.clip_grad_norm_(parameters(ours), max_norm, p)
    expected = torch.nn.utils.clip_grad_norm_(parameters(theirs), max_norm, float(p))
    torch.testing.assert_close(norm, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=0)


def test_get_total_norm_then_clip_grads_with_norm_is_clip_grad_norm_(engine: Engine) -> None:
    one, two = ([engine.randn(n, seed=n) for n in (2, 30, 400)] for _ in range(2))
    norm = fusedclip.clip_grad_norm_(parameters(one), 0.3)
    total = fusedclip.get_total_norm(two)
    assert fusedclip.clip_grads_with_norm_(parameters(two), 0.3, total) is None
    assert engine.same(total, norm)
    torch.testing.assert_close(one, two, rtol=2e-7, atol=0)


def test_after_get_total_norm_bad_gradients_are_still_refused(engine: Engine) -> None:
    """The second call looks no further at what the first has measured, and nothing is to be clipped here."""
    good = parameters([engine.randn(n, seed=n) for n in (2, 30)])
    without = torch.nn.Parameter(engine.randn(5))
    grads = [p.grad for p in good if p.grad is not None]
    bad = torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    bad.grad = torch.ones(3, dtype=torch.int64)
    for held, error in (
        ([*good, bad], TypeError),
        ([good[0], bad], TypeError),
        ([bad, *good], TypeError),
        ([*good, without * 1], ValueError),
        ([*good, "weight"], TypeError),
        (grads, TypeError),
        ([good[0]], None),
        ([good[1], without, good[0]], None),
        ([good[0], without, good[1]], None),
        ([], None),
    ):
        norm = fusedclip.get_total_norm(grads)
        with nullcontext() if error is None else pytest.raises(error):
            fusedclip.clip_grads_with_norm_(held, 1e9, norm)
    fusedclip.clip_grads_with_norm_(good, 0.5, norm)
    oracle.assert_close(fusedclip.get_total_norm(grads), 0.5, 1e-5)


def test_get_total_norm_keeps_no_gradient_alive(engine: Engine) -> None:
    gradient = engine.randn(30)
    gone = weakref.ref(gradient)
    fusedclip.get_total_norm([gradient])
    del gradient
    assert gone() is None


@pytest.mark.parametrize("total", [4.0, torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float16)])
def test_clip_grads_with_norm_takes_a_number_or_a_tensor(engine: Engine, total: object) -> None:
    grads = [engine.randn(50)]
    before = copies(grads)
    fusedclip.clip_grads_with_norm_(parameters(grads), 1.0, total)
    oracle.assert_scaled(grads[0], before[0], oracle.coefficient(4.0, 1.0), 1.5)
    unchanged = copies(grads)
    fusedclip.clip_grads_with_norm_(parameters(grads), 5.0, total)
    assert torch.equal(grads[0], unchanged[0])


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bound", [0.1, 1.0, 0.0, 1e9, math.inf])
def test_clip_grad_value(engine: Engine, dtype: torch.dtype, bound: float) -> None:
    grads = [engine.randn(n, dtype=dtype, seed=n) for n in (3, 64, 70001)]
    grads[0][1] = math.nan
    grads[1][:2] = engine.tensor([math.inf, -math.inf], dtype)
    expected = [g.double().clamp(-bound, bound).to(dtype) for g in grads]
    assert fusedclip.clip_grad_value_(parameters(grads), bound) is None
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_value_clip_that_changes_nothing_writes_nothing() -> None:
    grads = [torch.randn(70000)]
    version = grads[0]._version
    fusedclip.clip_grad_value_(parameters(grads), 100.0)
    assert grads[0]._version == version
    fusedclip.clip_grad_value_(parameters(grads), 0.1)
    assert grads[0]._version > version
    version = grads[0]._version
    fusedclip.clip_grad_value_(parameters(grads), 0.1)  # 0.1 in float32 is above 0.1: not to be clamped again and again
    assert grads[0]._version == version


def test_a_value_clip_tells_autograd_of_what_it_wrote_alone() -> None:
    grads = [torch.full((5,), value) for value in (0.5, 2.0, 0.1)] + [torch.full((6,), 0.5)[::2]]
    versions = [g._version for g in grads]
    fusedclip.clip_grad_value_(parameters(grads), 1.0)
    assert [g._version > v for g, v in zip(grads, versions, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [1.0, 1e-3, 1e-6, 1e-7])
def test_coefficients_that_are_tiny(engine: Engine, dtype: torch.dtype, max_norm: float) -> None:
    grads = [engine.tensor([3e38, -1e38, 1e30, 1.0], dtype)]
    before = copies(grads)
    expected = oracle.norm(before)
    fusedclip.clip_grad_norm_(parameters(grads), max_norm)
    oracle.assert_scaled(grads[0], before[0], oracle.coefficient(expected, max_norm), engine.ulps(dtype))


@pytest.mark.parametrize("device", ["meta"])
def test_the_default_device_does_not_matter(engine: Engine, device: str) -> None:
    ours, same = ([engine.randn(10), engine.randn(30, seed=1)] for _ in range(2))
    norm = fusedclip.clip_grad_norm_(parameters(ours), 0.5)
    holders = parameters(same)
    with torch.device(device):
        results = [
            fusedclip.clip_grad_norm_(holders, 0.5),
            fusedclip.get_total_norm(same),
            fusedclip.get_total_norm([]),
            fusedclip.get_total_norm(same, error_if_nonfinite=True),
            *fusedclip.get_per_tensor_norms(same),
            *fusedclip.clip_grad_norm_per_tensor_(holders, 100.0),
        ]
        fusedclip.clip_grads_with_norm_(holders, 1.0, 0.5)
        fusedclip.clip_grad_value_(holders, 100.0)
    assert results[0] == norm
    assert all(r.device.type in (engine.device, "cpu") for r in results)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
