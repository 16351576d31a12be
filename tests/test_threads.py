"""Python threads that clip at once: each gets the norm and the gradients of its own list."""

import threading
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
