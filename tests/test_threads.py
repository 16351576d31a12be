"""Python threads that clip at once: each gets the norm and the gradients of its own list.

FUSEDCLIP_SECONDS says for how long the sixteen go on, for a run before a release.
"""

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import fusedclip
from fusedclip import backends

from . import oracle
from .conftest import Engine, copies, parameters


def own_stream(engine: Engine) -> AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream()) if engine.device == "cuda" else nullcontext()


def test_threads_at_once(engine: Engine) -> None:
    if engine.name == "triton" and engine.device == "cpu":
        pytest.skip("Triton's interpreter runs in one thread")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with backends.use(engine.name), own_stream(engine):
                for step in range(30):
                    grads = [engine.randn(10_000 + step, seed=seed), engine.randn(77, dtype=torch.float16, seed=seed)]
                    before = copies(grads)
                    norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0)
                    expected = oracle.norm(before)
                    oracle.assert_close(norm, expected, 3e-6)
                    for after, b in zip(grads, before, strict=True):
                        oracle.assert_scaled(after, b, oracle.coefficient(expected, 1.0), engine.ulps(b.dtype))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


SECONDS = float(os.environ.get("FUSEDCLIP_SECONDS", "2"))


def test_sixteen_threads_with_models_of_their_own() -> None:
    failures: list[BaseException] = []
    end = time.monotonic() + SECONDS
    steps = [0] * 16

    def train(number: int) -> None:
        try:
            made = torch.Generator().manual_seed(number)
            model = torch.nn.Sequential(*(torch.nn.Linear(8 + number, 8 + number) for _ in range(1 + number)))
            params = list(model.parameters())
            while not steps[number] or time.monotonic() < end:
                for parameter in params:
                    parameter.grad = torch.randn(parameter.shape, generator=made)
                before = [parameter.grad.clone() for parameter in params if parameter.grad is not None]
                limit = 0.1 * (1 + steps[number] % 40)
                norm = fusedclip.clip_grad_norm_(params, limit, error_if_nonfinite=bool(number % 2))
                expected = oracle.norm(before)
                oracle.assert_close(norm, expected, 3e-6)
                for parameter, b in zip(params, before, strict=True):
                    assert parameter.grad is not None
                    oracle.assert_scaled(parameter.grad, b, oracle.coefficient(expected, limit), 1.5)
                steps[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert min(steps) > 0  # a busy machine may give no thread a second one
