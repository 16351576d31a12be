"""What README and GUARANTEES promise of every call, held by the optimizers' steps: bits, waiting, memory, threads."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedclip import _extension
from fusedclip.optim import SGD, AdamW

from ..conftest import Engine, engines
from ..host_reads import host_reads
from ..test_memory import MIB, linux, with_peak

KINDS: list[Callable[..., Optimizer]] = [
    lambda ps, **own: AdamW(ps, **own),
    lambda ps, **own: AdamW(ps, amsgrad=True, moments=torch.bfloat16, **own),
    lambda ps, **own: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, **own),
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["AdamW", "amsgrad", "SGD"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def run(kind: Callable[..., Optimizer], dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Parameters and states after some steps, as bits."""
    generator = torch.Generator().manual_seed(seed)

    def randn(count: int) -> Tensor:
        return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)

    ps = [Parameter(randn(n)) for n in (5, 300_001, 33)]
    optimizer = kind(ps, max_norm=0.5)
    for _ in range(3):
        for p in ps:
            p.grad = randn(p.numel())
        optimizer.step()
    kept = [t for p in ps for t in (p.detach(), *optimizer.state[p].values())]
    return [t.flatten().view(torch.uint8) for t in kept]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@kinds
@dtypes
def test_the_same_bits_again_and_on_every_instruction_set(kind: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    first = run(kind, dtype)
    assert_same_bits(run(kind, dtype), first)
    sets = _extension.C.instruction_sets()
    try:
        for one in sets:
            _extension.C.use_instruction_set(one)
            assert_same_bits(run(kind, dtype), first)
    finally:
        _extension.C.use_instruction_set(sets[0])


@engines("cpu", "reference", on="cpu")
@kinds
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-39), (torch.float64, 1e-310), (torch.bfloat16, 1e-39)])
def test_flushing_of_subnormals_changes_nothing(
    engine: Engine, kind: Callable[..., Optimizer], dtype: torch.dtype, scale: float
) -> None:
    ps = [Parameter(torch.linspace(-1, 1, n, dtype=torch.float64).mul(scale).to(dtype)) for n in (33, 300_001)]
    gradients = [p.detach().flip(0) for p in ps]
    assert all(gradient.any() for gradient in gradients)

    def moved() -> list[Tensor]:
        own = [Parameter(p.detach().clone()) for p in ps]
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer = kind(own, max_norm=0.5)
        optimizer.step()
        optimizer.step()
        return [t.flatten().view(torch.uint8) for p in own for t in (p.detach(), *optimizer.state[p].values())]

    expected = moved()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        flushed = moved()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed, expected)


def test_the_host_reads_no_tensor_for_several_limits_and_rules() -> None:
    ps = [Parameter(torch.randn(n)) for n in (10, 70_001, 3)]
    for p in ps:
        p.grad = torch.randn(p.shape)
    groups: list[dict[str, Any]] = [
        {"params": ps[:1]},
        {"params": ps[1:2], "max_norm": 0.1},
        {"params": ps[2:], "amsgrad": True},
    ]
    optimizer: Any = AdamW(groups, max_norm=1.0, on_nonfinite="skip")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())
    with host_reads() as reads:
        optimizer.step()
        optimizer.step()
    assert reads == []


@kinds
def test_two_optimizers_in_two_threads(kind: Callable[..., Optimizer]) -> None:
    alone = [run(kind, torch.float32, seed) for seed in range(2)]
    together: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        together[seed] = run(kind, torch.float32, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert_same_bits(together[seed], alone[seed])


@linux
@kinds
def test_a_step_takes_no_memory(kind: Callable[..., Optimizer]) -> None:
    ps = [Parameter(torch.zeros(8 * MIB)) for _ in range(2)]  # 64 MiB
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = kind(ps, max_norm=1.0)
    optimizer.step()
    assert with_peak(optimizer.step) < 0.2 * MIB


def test_a_pickled_copy_goes_on_alike() -> None:
    p = Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], max_norm=torch.tensor(0.1), master="split")
    optimizer.step()
    twin = pickle.loads(pickle.dumps(optimizer))
    q = twin.param_groups[0]["params"][0]
    q.grad = torch.ones_like(q)
    for one in (optimizer, twin):
        one.step()
    assert torch.equal(optimizer.master_of(p), twin.master_of(q))
    assert torch.equal(optimizer.total_norm, twin.total_norm)  # type: ignore[arg-type]


def test_tracers_are_refused() -> None:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdamW([p], max_norm=1.0)

    def step(x: Tensor) -> Tensor:
        optimizer.step()
        return x + 1

    with pytest.raises(NotImplementedError, match="cannot run under"):
        torch.jit.trace(step, torch.ones(2))  # type: ignore[no-untyped-call]
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="cannot run under"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
