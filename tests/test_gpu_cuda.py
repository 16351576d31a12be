"""What only a GPU can show of the CUDA engine: syncs, both forms, graphs, streams, threads, devices, sizes, memory."""

import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import fusedclip
from fusedclip import _extension, backends
from fusedclip.backends import cuda
from fusedclip.gradients import Batch
from fusedclip.norms import ClipRule

from . import oracle
from .conftest import parameters
from .device_waits import no_waits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 4096, 70_001, 300_000]


@pytest.fixture(autouse=True)
def _cuda_engine() -> Iterator[None]:
    with backends.use("cuda"):
        yield


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device = DEVICE
) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def mixed(device: torch.device = DEVICE) -> list[torch.Tensor]:
    """Every dtype and size, aligned and not."""
    return [
        randn(n + shift, dtype=dtype, seed=n, device=device)[shift:]
        for dtype in DTYPES
        for n in SIZES
        for shift in (0, 1)
    ]


def check_clipped(after: list[torch.Tensor], before: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    oracle.assert_close(norm, oracle.norm(before), 3e-6)
    coef = min(1.0, max_norm / (float(norm) + 1e-6))
    for a, b in zip(after, before, strict=True):
        exact = b.double() * coef
        tolerance = 1e-6 if b.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(b.dtype).eps
        assert (a.double() - exact).abs().le(exact.abs() * tolerance + torch.finfo(b.dtype).tiny).all()


CALLS: dict[str, Callable[[list[torch.nn.Parameter]], object]] = {
    "clip": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0),
    "clip, p=inf": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, math.inf),
    "clip, p=3": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, 3),
    "clip, p=0": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, 0),
    "clip, limit on the device": lambda ps: fusedclip.clip_grad_norm_(ps, torch.ones((), device=DEVICE)),
    "clip, zeros": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, on_nonfinite="zero"),
    "norm": lambda ps: fusedclip.get_total_norm([p.grad for p in ps if p.grad is not None]),
    "norms": lambda ps: fusedclip.get_per_tensor_norms([p.grad for p in ps if p.grad is not None]),
    "clip per tensor": lambda ps: fusedclip.clip_grad_norm_per_tensor_(ps, 1.0),
    "clip with norm": lambda ps: fusedclip.clip_grads_with_norm_(ps, 1.0, torch.full((), 3.0, device=DEVICE)),
    "clip with a number": lambda ps: fusedclip.clip_grads_with_norm_(ps, 1.0, 3.0),
    "clip value": lambda ps: fusedclip.clip_grad_value_(ps, 0.5),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_host_never_waits(call: Callable[[list[torch.nn.Parameter]], object]) -> None:
    held = parameters([*mixed(), None])
    call(held)  # the first call asks the device about itself
    with no_waits():
        call(held)


def test_the_guards_guard() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        torch.ones((), device=DEVICE).item()
    with pytest.raises((AssertionError, RuntimeError), match=r"had time to finish|synchroniz"), no_waits():
        torch.cuda.synchronize()  # of which torch's own guard may not tell


@pytest.mark.parametrize("form", [cuda.TWO_LAUNCHES, cuda.ON_CHIP], ids=["two launches", "on chip"])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -math.inf])
@pytest.mark.parametrize("fraction", [0.3, 2.0])
def test_both_forms(form: int, p: float, fraction: float) -> None:
    grads = [g for g in mixed() if g.numel()]
    before = [g.clone() for g in grads]
    engine = cuda.Cuda()
    engine.form = form
    expected = oracle.norm(before, p)
    clipped = engine.clip_(Batch(grads, DEVICE), p, ClipRule(expected * fraction), torch.float64)
    oracle.assert_close(clipped.norm, expected, 3e-6)
    oracle.assert_close(clipped.coef, min(1.0, expected * fraction / (expected + 1e-6)), 3e-6)
    for after, b in zip(grads, before, strict=True):
        coef = clipped.coef.to(torch.float64 if b.dtype == torch.float64 else torch.float32)
        assert torch.equal(after, (b.to(coef.dtype) * coef).to(b.dtype))


def test_both_forms_agree_to_the_last_bits_of_a_float() -> None:
    grads = [randn(n, seed=n) for n in (5_000_000, 1000, 3)]
    norms = []
    for form in (cuda.TWO_LAUNCHES, cuda.ON_CHIP, cuda.TWO_LAUNCHES):
        engine = cuda.Cuda()
        engine.form = form
        norms.append(engine.clip_(Batch([g.clone() for g in grads], DEVICE), 2.0, ClipRule(1.0), torch.float64).norm)
    assert norms[0] == norms[2]  # bit by bit
    oracle.assert_close(norms[1], float(norms[0]), 1e-7)


@pytest.mark.parametrize("elements", [1000, 3_000_000, 60_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_around_what_fits_on_the_chip(elements: int, dtype: torch.dtype) -> None:
    grad = torch.randn(elements, device=DEVICE, dtype=dtype)
    before = grad.clone()
    fits = _extension.C.cuda_fits_on_chip(Batch([grad], DEVICE).table, 2.0)
    assert fits == (elements < 10_000_000)
    norm = fusedclip.clip_grad_norm_(parameters([grad]), 1.0)
    check_clipped([grad], [before], norm, 1.0)


def test_multiplier_is_part_of_norm_and_coefficient() -> None:
    grads, scale = mixed(), torch.full((), 1 / 64, device=DEVICE)
    before = [g.clone() for g in grads]
    expected = oracle.norm(before) / 64
    clipped = cuda.Cuda().clip_(Batch(grads, DEVICE), 2.0, ClipRule(expected / 2), torch.float64, multiplier=scale)
    oracle.assert_close(clipped.norm, expected, 3e-6)
    oracle.assert_close(clipped.coef, 0.5 / 64, 3e-6)


@pytest.mark.parametrize(("count", "on_chip"), [(300, True), (40_000_000, False)], ids=["on chip", "two launches"])
def test_graph_replays_see_the_gradients_of_the_day(count: int, on_chip: bool) -> None:
    grads = [randn(count, seed=1), randn(333, dtype=torch.bfloat16, seed=2)]
    held = parameters(grads)
    assert cuda._C.cuda_fits_on_chip(Batch(grads, DEVICE).table, 2.0) == on_chip
    fusedclip.clip_grad_norm_(held, 1.0)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fusedclip.clip_grad_norm_(held, 1.0)
    for replay in range(3):
        for i, grad in enumerate(grads):
            grad.copy_(randn(grad.numel(), seed=10 * replay + i) * (1e-5 if replay == 1 else 1))
        before = [g.clone() for g in grads]
        graph.replay()
        check_clipped(grads, before, norm, 1.0)


def test_side_streams() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    lists = []
    for i, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what is on another stream would run before the gradients are there
            grads = [torch.randn(1_000_000, device=DEVICE).mul_(i + 1) for _ in range(3)]
            before = [g.clone() for g in grads]
            lists.append((grads, before, fusedclip.clip_grad_norm_(parameters(grads), 1.0)))
    torch.cuda.synchronize()
    for grads, before, norm in lists:
        check_clipped(grads, before, norm, 1.0)


def test_python_threads() -> None:
    failures = []

    def work(seed: int) -> None:
        try:
            with backends.use("cuda"), torch.cuda.stream(torch.cuda.Stream()):
                for step in range(50):
                    grads = [randn(10_000 + step, seed=seed), randn(77, dtype=torch.float16, seed=seed + 1)]
                    before = [g.clone() for g in grads]
                    check_clipped(grads, before, fusedclip.clip_grad_norm_(parameters(grads), 1.0), 1.0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_devices_in_one_list() -> None:
    grads = [*mixed(torch.device("cuda:1")), *mixed(torch.device("cuda:0"))]
    before = [g.clone() for g in grads]
    current = torch.cuda.current_device()
    norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    assert torch.cuda.current_device() == current
    assert norm.device == torch.device("cuda:1")
    check_clipped(grads, before, norm, 1.0)


def test_more_elements_than_an_int_counts() -> None:
    count = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    grad = torch.zeros(count, device=DEVICE, dtype=torch.bfloat16)
    places = torch.tensor([0, 2**31 - 1, 2**31, count - 1], device=DEVICE)
    grad[places] = 3.0
    norm = fusedclip.clip_grad_norm_(parameters([grad]), 3.0)
    assert norm == 6.0
    assert torch.equal(grad[places], torch.full((4,), 1.5, device=DEVICE, dtype=torch.bfloat16))
    fusedclip.clip_grad_value_(parameters([grad]), 1.0)
    assert torch.equal(grad[places], torch.ones(4, device=DEVICE, dtype=torch.bfloat16))


@pytest.mark.parametrize("tensors", [1, 3000])
def test_peak_memory_is_that_of_tensors_and_blocks(tensors: int) -> None:
    held = parameters([torch.ones(50_000_000 // tensors, device=DEVICE) for _ in range(tensors)])
    fusedclip.clip_grad_norm_(held, 1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for call in (CALLS["clip"], CALLS["clip per tensor"], CALLS["clip value"]):
        call(held)
    blocks = 2 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert torch.cuda.max_memory_allocated() - before <= 64 * (tensors + 4 * blocks) + 64 * 1024


def test_a_gradient_that_was_written_cannot_be_backpropagated_through() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x * 2
    saved = (y * y).sum()
    held = parameters([y.detach()])
    fusedclip.clip_grad_norm_(held, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
