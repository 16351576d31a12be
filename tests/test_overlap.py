"""Gradients that overlap, as views of one buffer may: each is written whole, in one order, whoever works on it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fusedclip

from .conftest import Engine, parameters

SHIFT = 100
NORM = 1.0 - 1e-6  # with torch's 1e-6 added it is 1, so that the limit is the coefficient


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def overlapping(buffer: Tensor) -> list[Tensor]:
    """Neither in ascending nor in descending order."""
    size = (len(buffer) - SHIFT) // 2
    return [buffer[SHIFT : SHIFT + size], buffer[SHIFT + size :], buffer[:size]]


def scaled(before: Tensor, coef: Tensor | float) -> Tensor:
    """One after the other. The order is all the same where there is one coefficient."""
    expected = before.clone()
    for gradient in overlapping(expected):
        gradient *= coef
    return expected


def clip(grads: list[Tensor], before: Tensor) -> Tensor:
    norm = fusedclip.clip_grad_norm_(parameters(grads), 0.5)
    return scaled(before, 0.5 / (norm + 1e-6))


def scale(grads: list[Tensor], before: Tensor) -> Tensor:
    fusedclip.clip_grads_with_norm_(parameters(grads), 0.5, NORM)
    return scaled(before, 0.5)


def clamp(grads: list[Tensor], before: Tensor) -> Tensor:
    fusedclip.clip_grad_value_(parameters(grads), 0.5)
    return before.clamp(-0.5, 0.5)


@pytest.mark.parametrize("write", [clip, scale, clamp])
def test_each_is_written_whole(engine: Engine, threads: int, write: Callable[[list[Tensor], Tensor], Tensor]) -> None:
    # The CPU engine gives a thread a MiB at least; what the others do in parallel shows with less.
    large = engine.name == "cpu"
    before = engine.randn(1_200_000 if large else 6_000, dtype=torch.float64)
    for _ in range(100 if large and threads > 1 else 3):
        buffer = before.clone()
        expected = write(overlapping(buffer), before)
        assert torch.equal(buffer, expected)


@pytest.mark.usefixtures("threads")
def test_of_different_dtypes(engine: Engine) -> None:
    # A clamped fp64 element is other fp32 elements: what comes out hangs on the order, and must not on the threads.
    before = engine.randn(600_000, dtype=torch.float64)
    results = []
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        buffer = before.clone()
        words = buffer.view(torch.float32)
        fusedclip.clip_grad_value_(parameters([words[200:], buffer[:-300], words[:-100]]), 1e-3)
        results.append(buffer)
    assert torch.equal(results[0].view(torch.int64), results[1].view(torch.int64))


def test_which_were_clamped(engine: Engine) -> None:
    grads = [engine.tensor([1.0, 2.0]), engine.randn(70_000) * 1e-3, engine.tensor([-3.0]), engine.tensor([0.5])]
    versions = [g._version for g in grads]
    fusedclip.clip_grad_value_(parameters(grads), 1.0)
    bumped = [g._version - v for g, v in zip(grads, versions, strict=True)]
    assert bumped[0] > 0
    assert bumped[2] > 0
    if engine.host_knows and engine.name == "cpu":
        assert bumped[1] == bumped[3] == 0
