"""What only a GPU shows of the Triton engine: no synchronisation, graphs, streams, threads, several devices."""

import threading

import pytest
import torch
from torch import Tensor

import fusedclip
from fusedclip import backends

from . import oracle
from .conftest import copies, parameters
from .device_waits import no_waits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SIZES = [3, 1000, 70001, 2_000_000]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gradients(seed: int, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(n, generator=generator, device=device).to(d) for n, d in zip(SIZES, DTYPES, strict=True)]


def check(norm: Tensor, before: list[Tensor], after: list[Tensor], max_norm: float) -> None:
    expected = oracle.norm(before)
    oracle.assert_close(norm, expected, 3e-6)
    for a, b in zip(after, before, strict=True):
        relative = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[b.dtype]
        coef = oracle.coefficient(expected, max_norm)
        torch.testing.assert_close(a.double(), b.double() * coef, rtol=relative, atol=1e-7)


def test_no_call_waits_for_the_device() -> None:
    grads = gradients(0)
    limit = torch.tensor(0.5, device="cuda")

    def all_calls() -> list[torch.nn.Parameter]:
        moved = parameters(copies(grads))
        fusedclip.clip_grad_norm_(moved, 0.5, on_nonfinite="zero")
        fusedclip.clip_grad_norm_(moved, limit)
        fusedclip.get_total_norm([p.grad for p in moved])
        fusedclip.get_per_tensor_norms([p.grad for p in moved])
        fusedclip.clip_grad_norm_per_tensor_(moved, 0.1)
        fusedclip.clip_grad_value_(moved, 0.1)
        return moved

    with backends.use("triton"):
        kept = [all_calls(), all_calls()]  # the first compiles; the second finds other addresses, and pins memory
        for _ in range(3):
            with no_waits():
                kept.append(all_calls())


def test_a_graph_clips_whatever_the_gradients_are_when_it_is_replayed() -> None:
    grads = gradients(0)
    holders = parameters(grads)
    with backends.use("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fusedclip.clip_grad_norm_(holders, 1.0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm = fusedclip.clip_grad_norm_(holders, 1.0)
        for seed in (1, 2, 3):
            before = gradients(seed)
            for grad, new in zip(grads, before, strict=True):
                grad.copy_(new)
            elsewhere = gradients(seed + 10)  # an eager call of the same shapes must not disturb the graph's table
            fusedclip.clip_grad_norm_(parameters(elsewhere), 1.0)
            graph.replay()
            check(norm, before, grads, 1.0)


def test_streams_at_once() -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    with backends.use("triton"):
        results = []
        for round_ in range(8):
            for i, stream in enumerate(streams):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(2_000_000)  # what is on another stream would run before the gradients are there
                    grads = gradients(round_ * 4 + i)
                    before = copies(grads)
                    results.append((fusedclip.clip_grad_norm_(parameters(grads), 1.0), before, grads))
        torch.cuda.synchronize()
        for norm, before, after in results:
            check(norm, before, after, 1.0)


def test_threads_at_once() -> None:
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            with backends.use("triton"):
                for seed in range(first, first + 10):
                    grads = gradients(seed)
                    before = copies(grads)
                    check(fusedclip.clip_grad_norm_(parameters(grads), 1.0), before, grads, 1.0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_devices_in_one_call() -> None:
    grads = [*gradients(0, "cuda:1"), *gradients(1, "cuda:0")]
    before = copies(grads)
    with backends.use("triton"):
        norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    assert norm.device == torch.device("cuda:1")
    check(norm, before, grads, 1.0)


def test_the_same_bits_every_time() -> None:
    with backends.use("triton"):
        results = [[fusedclip.clip_grad_norm_(parameters(g), 1.0), *g] for g in (gradients(5) for _ in range(5))]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_beyond_two_to_the_31_elements() -> None:
    count = (1 << 31) + 4097
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("needs 6 GB of free memory")
    grad = torch.zeros(count, dtype=torch.float16, device="cuda")
    grad[-1], grad[1 << 31] = 3.0, 4.0
    with backends.use("triton"):
        assert fusedclip.clip_grad_norm_(parameters([grad]), 1.0) == 5.0
    torch.testing.assert_close(grad[-1].item(), 0.6, rtol=1e-3, atol=0)
    torch.testing.assert_close(grad[1 << 31].item(), 0.8, rtol=1e-3, atol=0)
