"""What only a GPU can get wrong: calls that wait for it, graphs, streams, several devices, 2^31 elements, memory."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedclip
from fusedclip import _extension
from fusedclip.gradients import Batch

from . import oracle
from .conftest import Engine, copies, engines, parameters
from .device_waits import no_waits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 4096, 70_001, 300_000]
on_gpu = engines("cuda", "triton", on="cuda")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")


def mixed(device: str) -> list[Tensor]:
    """Every dtype and size, aligned and not."""
    made = []
    for dtype in DTYPES:
        for size in SIZES:
            for shift in (0, 1):
                values = torch.randn(size + shift, generator=torch.Generator().manual_seed(size))
                made.append(values.to(device, dtype)[shift:])
    return made


def check_clipped(after: list[Tensor], before: list[Tensor], norm: Tensor, max_norm: float) -> None:
    oracle.assert_close(norm, oracle.norm(before), 3e-6)
    coef = oracle.coefficient(float(norm), max_norm)
    for a, b in zip(after, before, strict=True):
        exact = b.double() * coef
        tolerance = 1e-6 if b.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(b.dtype).eps
        assert (a.double() - exact).abs().le(exact.abs() * tolerance + torch.finfo(b.dtype).tiny).all()


def gradients_of(held: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in held if p.grad is not None]


CALLS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "clip": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0),
    "clip, p=inf": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, math.inf),
    "clip, p=3": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, 3),
    "clip, p=0": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, 0),
    "clip, limit on the device": lambda ps: fusedclip.clip_grad_norm_(ps, torch.ones((), device="cuda")),
    "clip, zeros": lambda ps: fusedclip.clip_grad_norm_(ps, 1.0, on_nonfinite="zero"),
    "norm": lambda ps: fusedclip.get_total_norm(gradients_of(ps)),
    "norms": lambda ps: fusedclip.get_per_tensor_norms(gradients_of(ps)),
    "clip per tensor": lambda ps: fusedclip.clip_grad_norm_per_tensor_(ps, 1.0),
    "clip with norm": lambda ps: fusedclip.clip_grads_with_norm_(ps, 1.0, torch.full((), 3.0, device="cuda")),
    "clip with a number": lambda ps: fusedclip.clip_grads_with_norm_(ps, 1.0, 3.0),
    "clip value": lambda ps: fusedclip.clip_grad_value_(ps, 0.5),
    "clip scopes": lambda ps: fusedclip.clip_grad_norm_scopes_({"a": ps[:9], "b": ps[9:]}, {"a": 0.5, "b": 1.0}),
}


@on_gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_host_never_waits(engine: Engine, call: Callable[[list[nn.Parameter]], object]) -> None:
    lists = [parameters([*mixed(engine.device), None]) for _ in range(4)]
    for held in lists[:2]:  # the first loads and compiles; the second finds other addresses, and pins memory for them
        call(held)
    for held in lists[2:]:
        with no_waits():
            call(held)


@on_gpu
def test_the_guards_guard(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        torch.ones((), device=engine.device).item()
    with pytest.raises((AssertionError, RuntimeError), match=r"had time to finish|synchroniz"), no_waits():
        torch.cuda.synchronize()  # of which torch's own guard may not tell


@on_gpu
@pytest.mark.parametrize(("count", "on_chip"), [(300, True), (40_000_000, False)], ids=["on chip", "two launches"])
def test_graph_replays_see_the_gradients_of_the_day(engine: Engine, count: int, on_chip: bool) -> None:
    def gradients(seed: int) -> list[Tensor]:
        return [engine.randn(count, seed=seed), engine.randn(333, dtype=torch.bfloat16, seed=seed + 1)]

    grads = gradients(0)
    held = parameters(grads)
    if engine.name == "cuda":
        assert _extension.C.cuda_fits_on_chip(Batch(grads, grads[0].device).table, 2.0) == on_chip
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fusedclip.clip_grad_norm_(held, 1.0)  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fusedclip.clip_grad_norm_(held, 1.0)
    for size in (1.0, 1e-5, 2.0):
        before = [new * size for new in gradients(10)]
        for grad, new in zip(grads, before, strict=True):
            grad.copy_(new)
        elsewhere = gradients(20)  # an eager call of the same shapes must not disturb what the graph reads
        fusedclip.clip_grad_norm_(parameters(elsewhere), 1.0)
        graph.replay()
        check_clipped(grads, before, norm, 1.0)


@on_gpu
def test_side_streams(engine: Engine) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    lists = []
    for i, stream in enumerate(streams * 3):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what is on another stream would run before the gradients are there
            grads = [torch.randn(1_000_000, device=engine.device).mul_(i + 1) for _ in range(3)]
            before = copies(grads)
            lists.append((grads, before, fusedclip.clip_grad_norm_(parameters(grads), 1.0)))
    torch.cuda.synchronize()
    for grads, before, norm in lists:
        check_clipped(grads, before, norm, 1.0)


@two_gpus
@on_gpu
def test_several_devices_in_one_list(engine: Engine) -> None:
    grads = [*mixed("cuda:1"), *mixed("cuda:0")]
    before = copies(grads)
    current = torch.cuda.current_device()
    norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0)
    assert torch.cuda.current_device() == current
    assert norm.device == torch.device("cuda:1")
    check_clipped(grads, before, norm, 1.0)


@on_gpu
def test_more_elements_than_an_int_counts(engine: Engine) -> None:
    count = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of free memory on the GPU")
    for dtype in (torch.bfloat16, torch.float16):
        grad = torch.zeros(count, device=engine.device, dtype=dtype)
        places = torch.tensor([0, 2**31 - 1, 2**31, count - 1], device=engine.device)
        grad[places] = 3.0
        assert fusedclip.clip_grad_norm_(parameters([grad]), 3.0) == 6.0
        assert torch.equal(grad[places], torch.full_like(grad[:4], 1.5))
        fusedclip.clip_grad_value_(parameters([grad]), 1.0)
        assert torch.equal(grad[places], torch.ones_like(grad[:4]))
        del grad


@engines("cuda", on="cuda")
@pytest.mark.parametrize("elements", [1000, 3_000_000, 60_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_around_what_fits_on_the_chip(engine: Engine, elements: int, dtype: torch.dtype) -> None:
    grad = torch.randn(elements, device=engine.device, dtype=dtype)
    before = grad.clone()
    fits = _extension.C.cuda_fits_on_chip(Batch([grad], grad.device).table, 2.0)
    assert fits == (elements < 10_000_000)
    check_clipped([grad], [before], fusedclip.clip_grad_norm_(parameters([grad]), 1.0), 1.0)


@engines("cuda", on="cuda")
@pytest.mark.parametrize("tensors", [1, 3000])
def test_peak_memory_is_that_of_tensors_and_blocks(engine: Engine, tensors: int) -> None:
    held = parameters([torch.ones(50_000_000 // tensors, device=engine.device) for _ in range(tensors)])
    fusedclip.clip_grad_norm_(held, 1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for name in ("clip", "clip per tensor", "clip value"):
        CALLS[name](held)
    blocks = 2 * torch.cuda.get_device_properties(engine.device).multi_processor_count
    assert torch.cuda.max_memory_allocated() - before <= 64 * (tensors + 4 * blocks) + 64 * 1024
