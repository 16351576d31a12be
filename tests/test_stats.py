"""Statistics from one read: each against the oracle, counts exactly, and the clip beside them as without."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedclip
from fusedclip import GradStats

from . import oracle
from .conftest import Engine, copies, parameters
from .test_properties import UNCHECKED, Drawn, gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FIELDS = ("norm", "abs_sum", "abs_max", "zeros", "nonfinite")


def expected(tensor: torch.Tensor, p: float = 2.0) -> tuple[float, float, float, int, int]:
    x = oracle.exact(tensor)
    sums = [float(oracle.root(oracle.lifted(x, q), q)) for q in (p, 1.0, math.inf)]
    return (sums[0], sums[1], sums[2], int((x == 0).sum()), int((~np.isfinite(x)).sum()))


def check(stats: GradStats, tensors: list[torch.Tensor], p: float = 2.0) -> None:
    """`tensors`: without repetitions."""
    dtype = torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in tensors) else torch.float32
    for field in FIELDS:
        assert getattr(stats, field).shape == (len(tensors),)
        assert getattr(stats.total, field).shape == ()
        for value in (getattr(stats, field), getattr(stats.total, field)):
            assert value.dtype == (torch.int64 if field in ("zeros", "nonfinite") else dtype)
    each = [expected(t, p) for t in tensors]
    for i, (norm, abs_sum, abs_max, zeros, nonfinite) in enumerate(each):
        close(stats.norm[i], norm, dtype)
        close(stats.abs_sum[i], abs_sum, dtype)
        assert stats.abs_max[i].isnan() if math.isnan(abs_max) else stats.abs_max[i] == rounded(abs_max, dtype)
        assert (stats.zeros[i], stats.nonfinite[i]) == (zeros, nonfinite)
    close(stats.total.norm, oracle.norm(tensors, p), dtype)
    close(stats.total.abs_sum, oracle.norm(tensors, 1.0), dtype)
    close(stats.total.abs_max, oracle.norm(tensors, math.inf), dtype)
    assert stats.total.zeros == sum(one[3] for one in each)
    assert stats.total.nonfinite == sum(one[4] for one in each)


def rounded(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, want: float, dtype: torch.dtype) -> None:
    if 0 < want <= torch.finfo(dtype).tiny:
        assert abs(float(got) - want) <= torch.finfo(dtype).eps * torch.finfo(dtype).tiny
    else:
        oracle.assert_close(got, float(rounded(want, dtype)), 3e-6)


def gradient(engine: Engine, count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Some zeros of both signs among ordinary elements."""
    tensor = engine.randn(count, dtype=dtype, seed=seed)
    tensor[::7] = 0.0
    tensor[3::14] *= -1
    return tensor


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_and_all(engine: Engine, dtype: torch.dtype, p: float) -> None:
    tensors = [gradient(engine, n, dtype, n) for n in (1, 5, 64, 1023, 8192, 70_001)]
    check(fusedclip.get_grad_stats(tensors, p), tensors, p)


def test_mixed_dtypes_and_layouts(engine: Engine) -> None:
    wide = gradient(engine, 9003, torch.float32, 1)
    tensors = [
        gradient(engine, 33, dtype, i)[1:].clone() if i % 2 else gradient(engine, 9003, dtype, i)[3:]
        for i, dtype in enumerate(DTYPES[:1] + DTYPES[2:])
    ]
    tensors += [wide[::3], wide[:9000].view(90, 100).t(), engine.randn(0), engine.tensor(0.0), engine.tensor(-3.0)]
    check(fusedclip.get_grad_stats(tensors), tensors)
    double = engine.randn(70).double()
    check(fusedclip.get_grad_stats([*tensors, double]), [*tensors, double])


def test_a_complex_element_counts_once(engine: Engine) -> None:
    z = torch.complex(engine.randn(300), engine.randn(300, seed=1))
    z[:10] = 0
    z[20] = complex(math.inf, math.nan)
    z[21] = complex(0.0, math.inf)
    z[30] = complex(0.0, 3.0)
    tensors = [z[:20].clone(), z, z[22:][::2]]
    check(fusedclip.get_grad_stats(tensors), tensors)


def test_sparse_gradients_are_their_values(engine: Engine) -> None:
    places = torch.tensor([[1, 5, 1]], device=engine.device)
    values = engine.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 4.0]])
    tensor = torch.sparse_coo_tensor(places, values, (9, 2), check_invariants=True)
    check(fusedclip.get_grad_stats([tensor]), [tensor])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_counted_where_they_are(engine: Engine, dtype: torch.dtype, bad: float) -> None:
    for places in ([0], [29_999], [5, 8191, 8192, 20_000]):
        tensors = [gradient(engine, 300, dtype, 1), gradient(engine, 30_000, dtype, 2)]
        tensors[1][places] = bad
        stats = fusedclip.get_grad_stats(tensors)
        assert stats.nonfinite.tolist() == [0, len(places)]
        check(stats, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_at_the_ends_of_the_range(engine: Engine, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    least = max(info.tiny, 1e-150)  # the squares of smaller ones vanish in fp64
    for scale in (least / 4, least, min(info.max / 8, 1e150), 2.0**-50):
        tensors = [(engine.randn(n, seed=n).double().clamp(-4, 4) * scale).to(dtype) for n in (1, 300, 20_000)]
        check(fusedclip.get_grad_stats(tensors), tensors)


def test_zeros_alone(engine: Engine) -> None:
    tensors = [torch.zeros(n, dtype=d, device=engine.device) for n, d in ((70_000, torch.float32), (9, torch.bfloat16))]
    stats = fusedclip.get_grad_stats(tensors)
    assert stats.zeros.tolist() == [70_000, 9]
    check(stats, tensors)


def test_constant_gradients(engine: Engine) -> None:
    tensors = [torch.full((n,), 0.1, dtype=d, device=engine.device) for n in (100_000, 9) for d in DTYPES]
    check(fusedclip.get_grad_stats(tensors), tensors)


def test_nothing_at_all(engine: Engine) -> None:
    for stats in (fusedclip.get_grad_stats([]), fusedclip.clip_grad_norm_with_stats_([], 1.0)):
        for field in FIELDS:
            assert getattr(stats, field).shape == (0,)
            assert getattr(stats.total, field) == 0
    stats = fusedclip.clip_grad_norm_with_stats_([torch.nn.Parameter(engine.randn(3))], 1.0)
    assert stats.norm.tolist() == stats.zeros.tolist() == [0]
    assert fusedclip.get_grad_stats(engine.randn(4)).norm.shape == (1,)
    assert fusedclip.get_grad_stats([engine.randn(0)]).abs_max.tolist() == [0]


def test_a_gradient_listed_twice_has_two_entries_and_counts_once(engine: Engine) -> None:
    a, b = gradient(engine, 40, torch.float32, 0), gradient(engine, 50, torch.float32, 1)
    stats, once = fusedclip.get_grad_stats(t for t in (a, b, a)), fusedclip.get_grad_stats([a, b])
    for field in FIELDS:
        each = getattr(stats, field)
        assert each[0] == each[2]
        assert torch.equal(each[:2], getattr(once, field))
        assert getattr(stats.total, field) == getattr(once.total, field)


@settings(suppress_health_check=UNCHECKED)
@given(drawn=st.lists(gradients(), min_size=1, max_size=5), p=st.sampled_from([2.0, 1.0, math.inf]))
def test_any_list(engine: Engine, drawn: list[Drawn], p: float) -> None:
    tensors = [one.on(engine.device) for one in drawn]
    check(fusedclip.get_grad_stats(tensors, p), tensors, p)


def test_the_norm_is_that_of_the_other_functions(engine: Engine) -> None:
    tensors = [
        gradient(engine, n, d, n) for n, d in ((200_000, torch.float32), (70_000, torch.bfloat16), (7, torch.half))
    ]
    for p in (2.0, 1.0, math.inf):
        stats = fusedclip.get_grad_stats(tensors, p)
        each, total = fusedclip.get_per_tensor_norms(tensors, p), fusedclip.get_total_norm(tensors, p)
        if engine.name in ("cpu", "reference"):  # others read in batches of another size
            assert torch.equal(stats.norm, each)
            assert stats.total.norm == total
        else:
            torch.testing.assert_close(stats.norm, each, rtol=1e-6, atol=0)
            torch.testing.assert_close(stats.total.norm, total, rtol=1e-6, atol=0)


def both(grads: list[torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], list[torch.nn.Parameter]]]:
    for _ in range(2):
        own = copies(grads)
        yield own, parameters(own)


@pytest.mark.parametrize("max_norm", [0.5, 1e9, 0.0, math.inf])
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
def test_clipping_with_statistics_is_clipping(engine: Engine, p: float, max_norm: float) -> None:
    grads = [gradient(engine, n, d, n) for n, d in ((9000, torch.float32), (700, torch.bfloat16), (7, torch.float16))]
    (plain, holders), (clipped, others) = both(grads)
    norm = fusedclip.clip_grad_norm_(holders, max_norm, p)
    stats = fusedclip.clip_grad_norm_with_stats_(others, max_norm, p)
    check(stats, grads, p)  # before clipping
    oracle.assert_close(stats.total.norm, float(norm), 1e-6)
    coef = oracle.coefficient(float(norm), max_norm)
    for one, other, before in zip(plain, clipped, grads, strict=True):
        assert torch.equal(one, other) or engine.name in ("cuda", "triton")
        oracle.assert_scaled(other, before, coef, engine.ulps(before.dtype) + 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_what_is_not_finite(engine: Engine, bad: float) -> None:
    grads = [engine.tensor([1.0, bad, 0.0]), engine.tensor([2.0])]
    (_, holders), (zeroed, others) = both(grads)
    with pytest.raises(RuntimeError, match=r"non-finite.*parameters\[0\]\.grad"):
        fusedclip.clip_grad_norm_with_stats_(holders, 1.0, error_if_nonfinite=True)
    assert holders[1].grad == 2.0
    stats = fusedclip.clip_grad_norm_with_stats_(others, 1.0, on_nonfinite="zero")
    assert stats.nonfinite.tolist() == [1, 0]
    assert stats.zeros.tolist() == [1, 0]
    assert all((z == 0).all() for z in zeroed)


def test_odd_gradients_are_clipped(engine: Engine) -> None:
    """What is read is not what is written."""
    grads = [torch.complex(engine.randn(30), engine.randn(30, seed=1)), engine.randn(90)[::3], engine.randn(8)]
    before = copies(grads)
    stats = fusedclip.clip_grad_norm_with_stats_([*parameters(grads), torch.nn.Parameter(engine.randn(2))], 0.5)
    assert stats.norm[-1] == 0
    norm = oracle.norm(before)
    oracle.assert_close(stats.total.norm, norm, 3e-6)
    for after, b in zip(grads, before, strict=True):
        torch.testing.assert_close(after, b * oracle.coefficient(norm, 0.5), rtol=1e-5, atol=0)


def test_the_same_bits_for_any_number_of_threads_and_every_time() -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3_000_000, 5, 700_001)]
    tensors += [tensors[0][:1_500_000].bfloat16()]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            stats = fusedclip.get_grad_stats(tensors)
            found.append(torch.cat([getattr(stats, f).double() for f in FIELDS]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found)


def test_all_instruction_sets_give_the_same_bits() -> None:
    from fusedclip import _extension

    if _extension.C is None:
        pytest.skip("no extension")
    sets = _extension.C.instruction_sets()
    tensors = [torch.randn(20_003, dtype=torch.float64).to(d) for d in DTYPES]
    tensors += [t[1:777].clone() for t in tensors]
    for t in tensors:
        t[5:9] = 0
        t[70] = math.inf
    found = []
    try:
        for name in sets:
            _extension.C.use_instruction_set(name)
            stats = fusedclip.get_grad_stats(tensors)
            found.append(torch.cat([getattr(stats, f).double() for f in FIELDS]))
    finally:
        _extension.C.use_instruction_set(sets[0])
    assert all(torch.equal(found[0], one) for one in found)


def test_other_orders_are_refused() -> None:
    grad = torch.ones(3)
    for p in (3.0, 0.0, -math.inf):
        for call in (
            lambda p=p: fusedclip.get_grad_stats([grad], p),
            lambda p=p: fusedclip.clip_grad_norm_with_stats_(parameters([grad]), 0.1, p),
        ):
            with pytest.raises(ValueError, match=r"order 2, 1 or inf.*get_per_tensor_norms"):
                call()
    assert (grad == 1).all()


def test_gradients_given_for_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="these look like gradients"):
        fusedclip.clip_grad_norm_with_stats_([torch.ones(3)], 1.0)
    with pytest.raises(TypeError, match=r"tensors\[0\] has dtype torch.int64"):
        fusedclip.get_grad_stats([torch.ones(3, dtype=torch.int64)])
