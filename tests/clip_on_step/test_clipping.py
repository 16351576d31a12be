"""What a step does and what the handle says of it, against torch's two calls."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW

from fusedclip.optim import ClipOnStep, clip_on_step

from .. import oracle
from ..conftest import Engine, parameters
from ..ranks import in_one_worker, on_two_ranks
from .optimizers import FUSED_KINDS, assert_same, give_gradients, held, pair


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
    assert isinstance(handle, ClipOnStep)
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


def test_the_coefficient_belongs_to_whoever_reads_it() -> None:
    (held,) = parameters([torch.ones(3, dtype=torch.float64)])
    optimizer = torch.optim.SGD([held], lr=0.1)
    handle = clip_on_step(optimizer, 100.0)
    for _ in range(2):
        optimizer.step()
        assert handle.clip_coef == 1
        handle.clip_coef.zero_()
    assert torch.equal(held.grad, torch.ones(3, dtype=torch.float64))


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


def test_every_engine(engine: Engine) -> None:
    for defer in (False, True):
        grads = [engine.randn(n, seed=n) for n in (10, 70001)]
        optimizer = SGD(parameters(grads), lr=1.0, fused=True)
        handle = clip_on_step(optimizer, 0.5, defer=defer)
        for parameter in held(optimizer):
            nn.init.zeros_(parameter)
        given = [g.clone() for g in grads]
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


@in_one_worker
def test_group() -> None:
    on_two_ranks(ranks_step_together)
