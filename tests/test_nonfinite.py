"""NaN and inf: where they go, who is named, and that a failed call changes nothing."""

import math

import pytest
import torch

import fusedclip

from .conftest import Engine, copies, parameters

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("place", [0, 1, 63, 64, 8191, 70000])
def test_nan_is_kept_by_every_norm(engine: Engine, dtype: torch.dtype, p: float, place: int) -> None:
    count = 70001 if place == 70000 else 8200  # whole steps of every engine, and a rest
    grads = [engine.randn(10, dtype=dtype), engine.randn(count, dtype=dtype), engine.randn(3, dtype=dtype)]
    grads[1][place] = math.nan
    assert fusedclip.get_total_norm(grads, p).isnan()
    assert fusedclip.clip_grad_norm_(parameters(grads), 1.0, p).isnan()
    assert all(g.isnan().all() for g in grads)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_a_nan_beside_an_inf_in_a_complex_number_is_a_nan(engine: Engine, p: float) -> None:
    grad = torch.view_as_complex(engine.tensor([[1.0, 2.0], [math.inf, math.nan]]))
    assert fusedclip.clip_grad_norm_(parameters([grad]), 1.0, p).isnan()
    assert torch.view_as_real(grad).isnan().all()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_inf_becomes_nan_and_the_rest_zero(engine: Engine, dtype: torch.dtype, p: float) -> None:
    grads = [engine.randn(10, dtype=dtype), engine.randn(70001, dtype=dtype)]
    grads[1][500] = -math.inf
    assert fusedclip.clip_grad_norm_(parameters(grads), 1.0, p) == math.inf
    assert grads[1][500].isnan()
    grads[1][500] = 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_zero_stores_zeros(engine: Engine, dtype: torch.dtype, bad: float) -> None:
    grads = [engine.randn(10, dtype=dtype), engine.randn(70001, dtype=dtype)]
    grads[0][3] = bad
    norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0, on_nonfinite="zero")
    assert not norm.isfinite()
    assert all((g == 0).all() for g in grads)


def test_zero_clips_finite_gradients_as_ever(engine: Engine) -> None:
    one, two = ([engine.randn(n, seed=n) for n in (5, 700)] for _ in range(2))
    fusedclip.clip_grad_norm_(parameters(one), 0.3)
    fusedclip.clip_grad_norm_(parameters(two), 0.3, on_nonfinite="zero")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_names_the_culprits_and_changes_nothing(engine: Engine, bad: float) -> None:
    grads = [engine.randn(10), engine.randn(700), engine.randn(3)]
    grads[1][5] = bad
    before = copies(grads)
    holders = parameters([grads[0], None, grads[1], grads[2]])
    with pytest.raises(RuntimeError, match=r"non-finite.*parameters\[2\]\.grad \((nan|inf)\)") as caught:
        fusedclip.clip_grad_norm_(holders, 1.0, error_if_nonfinite=1)  # type: ignore[arg-type]
    assert "parameters[0]" not in str(caught.value)
    assert all(torch.equal(g.nan_to_num(9), b.nan_to_num(9)) for g, b in zip(grads, before, strict=True))
    with pytest.raises(RuntimeError, match=r"tensors\[1\]"):
        fusedclip.get_total_norm(grads, error_if_nonfinite=True)


def test_error_if_nonfinite_lets_finite_gradients_pass(engine: Engine) -> None:
    one, two = ([engine.randn(n, seed=n) for n in (5, 700)] for _ in range(2))
    norm = fusedclip.clip_grad_norm_(parameters(one), 0.3)
    assert engine.same(norm, fusedclip.clip_grad_norm_(parameters(two), 0.3, error_if_nonfinite=True))
    torch.testing.assert_close(one, two, rtol=2e-7, atol=0)


def test_a_norm_beyond_the_range_of_its_dtype(engine: Engine) -> None:
    """The gradients can be clipped, and are. Who asks for a finite norm gets the one that it is, in fp64."""
    for error_if_nonfinite in (False, True):
        grads = [torch.full((100,), 3e38, device=engine.device)]
        norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0, 2.0, error_if_nonfinite)
        total = fusedclip.get_total_norm([torch.full_like(grads[0], 3e38)], 2.0, error_if_nonfinite)
        for value in (norm, total):
            if error_if_nonfinite:
                assert value.dtype == torch.float64
                torch.testing.assert_close(value.item(), 3e39, rtol=1e-6, atol=0)
            else:
                assert value.dtype == torch.float32
                assert value == math.inf
        torch.testing.assert_close(grads[0], torch.full_like(grads[0], 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beyond", [False, True])
def test_norms_just_above_the_largest_float_are_rounded_alike_on_every_road(engine: Engine, beyond: bool) -> None:
    most = torch.finfo(torch.float32).max
    # A hair above the largest float, and above the middle between it and the next, which is inf.
    grads = [engine.tensor([most, 2.0**104 if beyond else 2.0**102])]
    expected = torch.tensor(math.inf if beyond else most)
    for norm in (
        fusedclip.get_total_norm(grads, 1.0),
        fusedclip.clip_grad_norm_(parameters([g.clone() for g in grads]), 1.0, 1.0),
        fusedclip.get_total_norm([*grads, engine.tensor([0.0, 0.0])[::2]], 1.0),
        fusedclip.get_per_tensor_norms(grads, 1.0)[0],
    ):
        assert norm.cpu() == expected


def test_total_norm_that_is_not_finite(engine: Engine) -> None:
    grads = [engine.tensor([1.0, 2.0])]
    fusedclip.clip_grads_with_norm_(parameters(grads), 1.0, math.inf)
    assert (grads[0] == 0).all()
    fusedclip.clip_grads_with_norm_(parameters(grads), 1.0, math.nan)
    assert grads[0].isnan().all()
