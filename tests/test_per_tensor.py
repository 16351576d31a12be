"""Norms of each tensor by itself, and clipping by them: nothing of one may reach its neighbours."""

import math

import pytest
import torch

import fusedclip

from . import oracle
from .conftest import Engine, copies, parameters


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -math.inf, 0.0, 3.0])
def test_norms(engine: Engine, p: float) -> None:
    tensors = [
        engine.randn(n, dtype=d, seed=n) for n, d in ((3, torch.bfloat16), (70001, torch.float32), (9, torch.float16))
    ]
    norms = fusedclip.get_per_tensor_norms(tensors, p)
    assert norms.shape == (3,)
    assert norms.dtype == torch.float32
    assert norms.device == tensors[0].device
    for got, tensor in zip(norms, tensors, strict=True):
        x = oracle.exact(tensor)
        oracle.assert_close(got, float(oracle.root(oracle.lifted(x, p), p)), 3e-6)


def test_fp64_results_and_empty_lists(engine: Engine) -> None:
    assert fusedclip.get_per_tensor_norms([engine.randn(3).double(), engine.randn(2)]).dtype == torch.float64
    assert fusedclip.get_per_tensor_norms([]).shape == (0,)
    assert fusedclip.get_per_tensor_norms(engine.randn(4)).shape == (1,)
    assert fusedclip.get_per_tensor_norms([engine.randn(0), engine.randn(2)])[0] == 0


def test_a_tensor_listed_twice_has_two_entries(engine: Engine) -> None:
    a, b = engine.randn(4), engine.randn(5, seed=1)
    norms = fusedclip.get_per_tensor_norms([a, b, a])
    assert norms.shape == (3,)
    assert norms[0] == norms[2] != norms[1]


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
def test_each_gradient_is_clipped_by_its_own_norm(engine: Engine, p: float) -> None:
    grads = [engine.randn(n, seed=n) * s for n, s in ((4, 10.0), (70001, 1e-6), (300, 1.0))]
    before = copies(grads)
    own = [oracle.norm([g], p) for g in before]
    holders = parameters(grads)
    holders.insert(1, torch.nn.Parameter(torch.zeros(2, device=engine.device)))  # without a gradient
    norms = fusedclip.clip_grad_norm_per_tensor_(holders, 1.0, p)
    assert norms.shape == (4,)
    assert norms[1] == 0
    for got, n in zip(norms[[0, 2, 3]], own, strict=True):
        oracle.assert_close(got, n, 3e-6)
    for after, b, n in zip(grads, before, own, strict=True):
        oracle.assert_scaled(after, b, oracle.coefficient(n, 1.0), 1.5)


def test_parameters_without_gradients_among_others(engine: Engine) -> None:
    """Frozen weights between trained adapters: every second one has no gradient."""
    grads = [engine.randn(3, seed=i) for i in range(7)]
    shared = grads[2]
    holders = parameters([g for grad in grads for g in (grad, None)] + [shared])
    norms = fusedclip.clip_grad_norm_per_tensor_(holders, math.inf)
    own = fusedclip.get_per_tensor_norms(grads)
    assert torch.equal(norms[:-1:2], own)
    assert (norms[1::2] == 0).all()
    assert norms[-1] == own[2]


def test_one_bad_gradient_leaves_the_others_alone(engine: Engine) -> None:
    grads = [engine.tensor([math.nan, 1.0]), engine.tensor([3.0, 4.0]), engine.tensor([0.1])]
    norms = fusedclip.clip_grad_norm_per_tensor_(parameters(grads), 1.0)
    assert norms[0].isnan()
    assert grads[0].isnan().all()
    torch.testing.assert_close(grads[1], engine.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert grads[2] == 0.1


def test_autograd_is_told_of_the_clipped_ones_only() -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.1])]
    versions = [g._version for g in grads]
    fusedclip.clip_grad_norm_per_tensor_(parameters(grads), 1.0)
    assert grads[0]._version > versions[0]
    assert grads[1]._version == versions[1]
