"""Gradients of every layout: complex, strided, channels-last, misaligned, empty, 0-d, sparse, listed twice."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch

import fusedclip

from . import oracle
from .conftest import Engine, parameters


def transposed(e: Engine) -> torch.Tensor:
    return e.randn(30, 50).t()


def channels_last(e: Engine) -> torch.Tensor:
    return e.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


def every_second(e: Engine) -> torch.Tensor:
    return e.randn(100, 8)[::2, 1::3]


def reversed_rows(e: Engine) -> torch.Tensor:
    return torch.as_strided(e.randn(40), (2, 3), (3, 2), 1)  # dimensions that interleave without overlapping


def misaligned(e: Engine) -> torch.Tensor:
    return e.randn(70003)[1:]


def misaligned_bfloat16(e: Engine) -> torch.Tensor:
    return e.randn(70003, dtype=torch.bfloat16)[3:70000]


def zero_dimensional(e: Engine) -> torch.Tensor:
    return e.tensor(3.0)


def complex64(e: Engine) -> torch.Tensor:
    return torch.complex(e.randn(50), e.randn(50, seed=1))


def complex128(e: Engine) -> torch.Tensor:
    return torch.complex(e.randn(50), e.randn(50, seed=1)).to(torch.complex128)


def conjugated(e: Engine) -> torch.Tensor:
    return complex64(e).conj()


def complex_strided(e: Engine) -> torch.Tensor:
    return complex64(e)[::2]


def negated(e: Engine) -> torch.Tensor:
    return complex128(e).conj().imag


def one_element_with_odd_strides(e: Engine) -> torch.Tensor:
    return torch.as_strided(e.randn(4), (1, 1), (0, 7))


def sparse(e: Engine) -> torch.Tensor:
    return torch.sparse_coo_tensor([[1, 5, 7]], e.randn(3, 4), (9, 4), check_invariants=True).coalesce()


def uncoalesced(e: Engine) -> torch.Tensor:
    return torch.sparse_coo_tensor([[1, 5, 1]], e.randn(3, 4), (9, 4), check_invariants=True, device=e.device)


LAYOUTS = [
    transposed, channels_last, every_second, reversed_rows, misaligned, misaligned_bfloat16, zero_dimensional,
    complex64, complex128, conjugated, complex_strided, negated, one_element_with_odd_strides, sparse, uncoalesced,
]  # fmt: skip


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_dense() if tensor.is_sparse else tensor).resolve_conj().resolve_neg().clone()


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 0.0])
def test_clip(engine: Engine, make: Callable[[Engine], torch.Tensor], p: float) -> None:
    grad = make(engine)
    double = grad.dtype in (torch.complex128, torch.float64)
    # Beside fp64, fp64: GPU engines sum floats in floats, which would show in the coefficient of fp64 elements.
    plain = engine.randn(200, seed=3, dtype=torch.float64 if double else torch.float32)
    before = [dense(grad), plain.clone()]
    expected = oracle.norm([grad, plain], p)
    version = grad._version
    norm = fusedclip.clip_grad_norm_(parameters([grad, plain]), expected / 3, p)
    oracle.assert_close(norm, expected, 3e-6)
    assert norm.dtype == (torch.float64 if double else torch.float32)
    coef = oracle.coefficient(expected, expected / 3)
    for after, b in zip((dense(grad), plain), before, strict=True):
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in (after, b)]
        oracle.assert_scaled(parts[0], parts[1], coef, engine.ulps(parts[0].dtype))
    if not grad.is_sparse:
        assert grad._version > version


@pytest.mark.parametrize("make", [f for f in LAYOUTS if "complex" not in f.__name__ and f is not conjugated])
def test_clip_value(engine: Engine, make: Callable[[Engine], torch.Tensor]) -> None:
    grad = make(engine)
    expected = dense(grad).clamp(-0.5, 0.5)
    fusedclip.clip_grad_value_(parameters([grad]), 0.5)
    assert torch.equal(dense(grad), expected)


@pytest.mark.parametrize("make", [every_second, reversed_rows, misaligned, misaligned_bfloat16])
def test_neighbours_in_memory_stay_as_they_were(engine: Engine, make: Callable[[Engine], torch.Tensor]) -> None:
    grad = make(engine)
    storage = grad._base
    inside = torch.zeros_like(storage, dtype=torch.bool)
    inside.as_strided(grad.shape, grad.stride(), grad.storage_offset())[...] = True
    outside = storage[~inside].clone()
    assert len(outside) > 0
    fusedclip.clip_grad_norm_(parameters([grad]), 1e-3)
    assert torch.equal(storage[~inside], outside)


def test_empty_tensors_count_for_nothing(engine: Engine) -> None:
    full = engine.randn(20)
    for p in (2.0, 1.0, math.inf, 3.0):
        empty = [engine.randn(0), engine.randn(3, 0, 2), engine.randn(0).double()]
        norm = fusedclip.clip_grad_norm_(parameters([empty[0], full, *empty[1:]]), 1e9, p)
        oracle.assert_close(norm, oracle.norm([full], p), 3e-6)
        assert fusedclip.clip_grad_norm_(parameters(empty), 1.0, p) == 0


def test_views_into_one_buffer_are_different_gradients(engine: Engine) -> None:
    buffer = engine.randn(1003)
    pieces = [buffer[:1], buffer[1:500], buffer[500:]]
    before, expected = buffer.clone(), oracle.norm([buffer])
    oracle.assert_close(fusedclip.clip_grad_norm_(parameters(pieces), 1.0), expected, 3e-6)
    oracle.assert_scaled(buffer, before, oracle.coefficient(expected, 1.0), 1.5)


def test_other_attribute(engine: Engine) -> None:
    holders = [torch.nn.Parameter(torch.zeros(2, device=engine.device)) for _ in range(3)]
    holders[0].main_grad = engine.tensor([30.0, 40.0])
    holders[1].main_grad = None
    holders[2].grad = engine.tensor([1e6, 1e6])
    assert fusedclip.clip_grad_norm_(holders, 5.0, grad_attr="main_grad") == 50
    torch.testing.assert_close(holders[0].main_grad, engine.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
    fusedclip.clip_grads_with_norm_(holders, 1.0, 2.0, grad_attr="main_grad")
    fusedclip.clip_grad_value_(holders, 1.5, grad_attr="main_grad")
    torch.testing.assert_close(holders[0].main_grad, engine.tensor([1.5, 1.5]))
    assert fusedclip.clip_grad_norm_per_tensor_(holders, 9.0, grad_attr="main_grad")[1:].tolist() == [0, 0]
    assert (holders[2].grad == 1e6).all()


def test_a_gradient_is_what_the_parameter_says_it_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subclasses, and whoever changes how attributes are found, are asked; not what lies below."""
    shown = engine.tensor([3.0, 4.0])

    class Descriptor:
        def __get__(self, owner: object, kind: type) -> torch.Tensor:
            assert owner is not None, "asked of the class, which has no gradient"
            return shown

    class Showing(torch.nn.Parameter):
        grad = Descriptor()

    holders = [*parameters([engine.tensor([12.0])]), Showing(engine.tensor([0.0, 0.0]))]
    assert fusedclip.clip_grad_norm_(holders, 100.0) == 13
    (plain,) = parameters([engine.tensor([1.0, 1.0])])

    def lookup(self: torch.nn.Parameter, name: str) -> object:
        return shown if name == "grad" else object.__getattribute__(self, name)

    monkeypatch.setattr(torch.nn.Parameter, "__getattribute__", lookup, raising=False)
    assert fusedclip.clip_grad_norm_([plain], 100.0) == 5


def test_an_interrupt_while_gradients_are_collected_is_not_lost() -> None:
    class Interrupted(torch.nn.Parameter):
        @property
        def grad(self) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedclip.clip_grad_norm_([Interrupted(torch.zeros(1))], 1.0)


def test_a_computed_tensor_is_no_parameter(engine: Engine) -> None:
    weight = torch.nn.Parameter(engine.tensor([1.0, 2.0]))
    weight.grad = engine.tensor([3.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for computed in (weight * 1, weight.view(2), torch.sparse_coo_tensor([[0, 1]], weight, check_invariants=True)):
            with pytest.raises(ValueError, match=r"parameters\[1\] is not a leaf.*Pass the parameter itself"):
                fusedclip.clip_grad_norm_([weight, computed], 1.0)
            assert weight.grad.tolist() == [3, 4]
        retaining = weight * 1
        retaining.retain_grad()
        assert fusedclip.clip_grad_norm_([retaining], 1.0) == 0
        (retaining * engine.tensor([6.0, 8.0])).sum().backward()
        assert fusedclip.clip_grad_norm_([retaining], 5.0) == 10
    torch.testing.assert_close(retaining.grad, engine.tensor([3.0, 4.0]), rtol=1e-5, atol=0)


def test_a_list_that_changes_under_our_hands(engine: Engine) -> None:
    class Clearing(torch.nn.Parameter):
        @property
        def grad(self) -> torch.Tensor:
            holders.clear()
            return engine.tensor([3.0])

    holders = [Clearing(engine.tensor([0.0])), *parameters([engine.tensor([4.0])])]
    assert fusedclip.clip_grad_norm_(holders, 1.0) == 5


def test_plain_subclasses_are_their_own_memory(engine: Engine) -> None:
    class Labelled(torch.Tensor):
        pass

    grad = engine.tensor([3.0, 4.0])
    (holder,) = parameters([grad.as_subclass(Labelled)])
    assert fusedclip.clip_grad_norm_([holder], 1.0) == 5
    torch.testing.assert_close(grad, engine.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def test_parameters_as_gradients_and_as_tensors(engine: Engine) -> None:
    weight = torch.nn.Parameter(engine.tensor([3.0, 4.0]))
    assert fusedclip.get_total_norm(iter([weight])) == 5
    assert fusedclip.get_total_norm(weight) == 5
    assert not fusedclip.get_total_norm([weight]).requires_grad


def test_many_dimensions(engine: Engine) -> None:
    for grad in (
        engine.randn(3, 4, *[1] * 20).transpose(0, 1),
        engine.randn(*[2] * 13, *[1] * 9).permute(*range(21, -1, -1)),
    ):
        expected = oracle.norm([grad])
        oracle.assert_close(fusedclip.clip_grad_norm_(parameters([grad]), 0.5), expected, 3e-6)


def test_one_memory_seen_as_different_tensors(engine: Engine) -> None:
    z = engine.tensor([3 + 4j, 1 + 1j], torch.complex64)
    norms = fusedclip.get_per_tensor_norms([z, torch.view_as_real(z)])
    torch.testing.assert_close(norms, engine.tensor([27**0.5] * 2))
    hybrid = sparse(engine)
    norms = fusedclip.get_per_tensor_norms([hybrid, hybrid.values()])
    assert norms[0] > 0
    assert engine.same(norms[0], norms[1])
    strided = engine.tensor([3.0, 0.0, 4.0, 0.0])[::2]
    assert fusedclip.get_total_norm([strided, strided]) == 5


def test_complex_modulus_does_not_overflow(engine: Engine) -> None:
    z = engine.tensor([1e200 + 1e200j] * 5, torch.complex128)
    for p in (1.0, math.inf):
        torch.testing.assert_close(fusedclip.get_total_norm([z], p), torch.linalg.vector_norm(z, p))


@pytest.mark.parametrize("make", [every_second, uncoalesced, sparse, complex_strided])
def test_not_clipped_is_not_copied_back(engine: Engine, make: Callable[[Engine], torch.Tensor]) -> None:
    if not engine.host_knows:
        pytest.skip("the host does not know whether anything was clipped")
    grad = make(engine)
    version, coalesced = grad._version, grad.is_sparse and grad.is_coalesced()
    for limit in (1e6, math.inf):
        fusedclip.clip_grad_norm_(parameters([grad]), limit)
        fusedclip.clip_grad_norm_per_tensor_(parameters([grad, engine.randn(8) * 1e9]), limit)
        if not grad.is_complex():
            fusedclip.clip_grad_value_(parameters([grad, engine.randn(8) * 1e9]), limit)
    assert grad._version == version
    assert (grad.is_sparse and grad.is_coalesced()) == coalesced
