"""The Triton engine's host path: how many launches, what is uploaded when, and whose memory a graph reads.

In a process with TRITON_INTERPRET=1 on CPU tensors, on a GPU compiled (`pytest -m gpu`).
"""

import math
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedclip import norms
from fusedclip.backends.triton import Triton
from fusedclip.dtypes import FLOATING
from fusedclip.gradients import Batch
from fusedclip.norms import Clipped, ClipRule

from . import oracle
from .conftest import NO_GPU, NO_INTERPRETER

ENGINE = Triton()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason=NO_INTERPRETER)),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    name: str = request.param
    if name == "cuda" and INTERPRETED:
        pytest.skip("nothing is compiled where TRITON_INTERPRET=1")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched in the test so far."""
    from fusedclip.backends.triton import launch

    names: list[str] = []
    real = launch.launch

    def counting(kernel: object, *arguments: object, **constants: object) -> None:
        names.append(kernel.fn.__name__)
        real(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", counting)
    return names


def batch_of(device: torch.device, *sizes: int) -> Batch:
    """Tensors of these sizes, of all dtypes in turn."""
    return make_batch([torch.randn(n, device=device).to(DTYPES[i % 4]) for i, n in enumerate(sizes)])


def make_batch(tensors: list[Tensor]) -> Batch:
    return Batch(tensors, tensors[0].device)


def clip(batch: Batch, rule: ClipRule, p: float = 2.0, **options: Tensor) -> Clipped:
    return ENGINE.clip_(batch, p, rule, torch.float64, **options)[0]


def test_the_interpreter_serves_where_it_is_asked_for() -> None:
    if INTERPRETED:  # or every test of this engine would be skipped in silence
        assert ENGINE.missing() is None
        assert ENGINE.refuses(torch.device("cpu"), FLOATING) is None
    else:
        assert ENGINE.missing() or "GPU" in str(ENGINE.refuses(torch.device("cpu"), FLOATING))


@pytest.mark.parametrize(
    ("sizes", "p"),
    [((0,), 2.0), ((5,), 1.0), ((70000,) * 4, 3.5), ((70000,) * 4, math.inf), ((9,) * 7, -math.inf), (range(100), 2.0)],
)
def test_launches_per_call(device: torch.device, launched: list[str], sizes: tuple[int, ...], p: float) -> None:
    batch = batch_of(device, *sizes)
    ENGINE.clip_(batch, p, ClipRule(0.5), torch.float32)
    assert launched == ["read_kernel", "settle_and_scale_kernel"]
    launched.clear()
    scalar = torch.tensor(0.5, device=device)
    ENGINE.clip_(batch, p, ClipRule(scalar, zero_nonfinite=True), torch.float64, multiplier=scalar)
    assert launched == ["read_kernel", "settle_and_scale_kernel"]
    launched.clear()
    ENGINE.norm(batch, p, torch.float32)
    assert launched == ["read_kernel", "norm_kernel"]
    launched.clear()
    each = norms.finish(ENGINE.lift(batch, p), p)
    assert launched == ["read_kernel", "per_tensor_kernel"]
    launched.clear()
    ENGINE.scale_(batch, each.clamp(max=1.0), zero=False)
    ENGINE.clamp_(batch, 0.1)
    assert launched == ["scale_kernel", "clamp_kernel"]


def test_tensors_that_share_memory_are_written_one_by_one(device: torch.device, launched: list[str]) -> None:
    buffer = torch.randn(1000, device=device)
    apart, shared = (make_batch([buffer[:n], buffer[500:]]) for n in (500, 501))
    coefs = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device)
    for batch, times in ((apart, 1), (shared, 2), (apart, 1)):
        ENGINE.scale_(batch, coefs, zero=False)
        ENGINE.clamp_(batch, 0.1)
        assert launched == ["scale_kernel"] * times + ["clamp_kernel"] * times
        launched.clear()
    before, norm = buffer.clone(), oracle.norm(shared.tensors)
    clipped = clip(shared, ClipRule(norm / 2))
    assert launched == ["read_kernel", "settle_and_scale_kernel", "scale_kernel", "scale_kernel"]
    oracle.assert_close(clipped.norm, norm, 3e-6)
    coef = float(clipped.coef)
    oracle.assert_scaled(buffer[:500], before[:500], coef, 1.5)
    oracle.assert_scaled(buffer[500:501], before[500:501], coef * coef, 3.0)
    oracle.assert_scaled(buffer[501:], before[501:], coef, 1.5)


def test_the_grid_does_not_grow_with_the_list(device: torch.device) -> None:
    from fusedclip.backends.triton import tables
    from fusedclip.backends.triton.tuning import default_for, programs_for, use

    tuning = default_for(device)
    most = programs_for(device, tuning.programs_per_processor)
    for sizes in ((1,), (200_000,), (10,) * 5000):
        with use(tuning):  # whatever has been measured for this device
            table = tables.table_for(batch_of(device, *sizes))
        assert table.programs == len(table.partials) == min(most, max(table.plan.tiles, 1))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers copied to the device by each upload in the test, starting without any cached table."""
    from fusedclip.backends.triton import tables

    sizes: list[int] = []
    real = tables.Table.point_to

    def counting(self: tables.Table, addresses: list[int]) -> Tensor | None:
        staged = real(self, addresses)
        if staged is not None:
            sizes.append(len(staged))
        return staged

    monkeypatch.setattr(tables.Table, "point_to", counting)
    monkeypatch.setattr(tables, "_tables", tables._Tables())
    return sizes


def test_what_is_uploaded(device: torch.device, uploads: list[int]) -> None:
    batch = batch_of(device, 3, 70000)
    expected = oracle.norm(batch.tensors)
    for _ in range(3):
        oracle.assert_close(ENGINE.norm(batch, 2.0, torch.float64), expected, 3e-6)
    assert len(uploads) == 1  # everything, once
    whole = uploads.pop()
    moved = make_batch([tensor.clone() for tensor in batch.tensors])
    for _ in range(2):
        oracle.assert_close(ENGINE.norm(moved, 2.0, torch.float64), expected, 3e-6)
    assert uploads == [2] < [whole]  # the addresses alone
    uploads.clear()
    other = batch_of(device, 4, 70000)
    oracle.assert_close(ENGINE.norm(other, 2.0, torch.float64), oracle.norm(other.tensors), 3e-6)
    oracle.assert_close(ENGINE.norm(moved, 2.0, torch.float64), expected, 3e-6)
    assert uploads == [whole]  # other shapes have a table of their own, the first one is still there


def test_same_sizes_and_addresses_with_another_dtype(device: torch.device) -> None:
    halves = torch.randn(1000, device=device).half()
    for tensor in (halves, halves.view(torch.bfloat16)):
        oracle.assert_close(ENGINE.norm(make_batch([tensor]), 1.0, torch.float64), oracle.norm([tensor], 1.0), 3e-6)


def test_the_cache_is_bounded(device: torch.device, uploads: list[int]) -> None:
    from fusedclip.backends.triton import tables

    for size in range(1, tables.CACHED + 10):
        tables.table_for(batch_of(device, size))
    assert len(tables._tables.cached) == tables.CACHED
    del uploads[:]
    tables.table_for(batch_of(device, tables.CACHED + 9))
    assert len(uploads) <= 1
    tables.table_for(batch_of(device, 1))
    assert uploads[-1] > 1  # was dropped, and came back whole


def test_threads_do_not_share_tables(device: torch.device) -> None:
    from fusedclip.backends.triton import tables

    batch = batch_of(device, 10)
    found = [tables.table_for(batch)]
    thread = threading.Thread(target=lambda: found.append(tables.table_for(batch)))
    thread.start()
    thread.join()
    assert found[0] is not found[1]
    assert found[0] is tables.table_for(batch)


def test_a_captured_call_owns_its_tables(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedclip.backends.triton import tables

    batch, moved = batch_of(device, 10, 70000), batch_of(device, 10, 70000)
    eager = tables.table_for(batch)
    with monkeypatch.context() as capturing:
        capturing.setattr(tables, "is_capturing", lambda device: True)
        kept = len(tables._captured)
        first, second = tables.table_for(batch), tables.table_for(batch)
    assert len({eager.data.data_ptr(), first.data.data_ptr(), second.data.data_ptr()}) == 3
    staged = tables._captured[kept:]
    assert len(staged) == 2
    assert staged[0].data_ptr() != staged[1].data_ptr()
    assert tables.table_for(moved) is eager
    expected = [t.data_ptr() for t in batch.tensors]
    for host in (*staged, first.data, second.data):  # neither the other capture nor the eager call has touched it
        assert host[:2].tolist() == expected
        assert host[2:].tolist() == first.plan.rows.tolist()


def test_what_a_graph_copies_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory, but for torch 2.10, which cannot give any while it records."""
    from fusedclip.backends.triton import tables

    gpu = torch.device("cuda", 0)
    found = {}
    for pins in (True, False):
        for captures in (True, False):
            monkeypatch.setattr(tables, "PINS_IN_CAPTURE", pins)
            monkeypatch.setattr(tables, "is_capturing", lambda device, captures=captures: captures)
            found[pins, captures] = tables._may_pin(gpu)
            assert not tables._may_pin(torch.device("cpu"))
    assert found == {(True, True): True, (True, False): True, (False, True): False, (False, False): True}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_at_the_edges_of_steps_and_tiles(device: torch.device, dtype: torch.dtype) -> None:
    from fusedclip.backends.triton.tuning import tuning_for

    tuning = tuning_for(device, frozenset([dtype]))
    step, tile = (size // dtype.itemsize for size in (tuning.step_bytes, tuning.tile_bytes))
    room = torch.randn(tile + 64, device=device).to(dtype)
    for offset in range(16 // dtype.itemsize + 1):
        for size in (0, 1, 7, step - offset, step + 1, tile, tile + 9 - offset):
            before = room.clone()
            view = room[offset : offset + size]
            expected = oracle.norm([view]) if size else 0.0
            clipped = clip(make_batch([view]), ClipRule(expected / 2))
            oracle.assert_close(clipped.norm, expected, 3e-6)
            if size:
                ulps = 1.5 if dtype == torch.float32 else 1.0
                oracle.assert_scaled(view, before[offset : offset + size], float(clipped.coef), ulps)
            view.copy_(before[offset : offset + size])
            assert torch.equal(room, before)  # the neighbours


@pytest.mark.parametrize("p", [2.0, 3.0])  # of other norms, see test_amp
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("multiplier", [1.0, 7.0])
def test_multiplier(device: torch.device, p: float, max_norm: float, multiplier: float) -> None:
    fused = batch_of(device, 10, 300, 500, 2000)
    composed, before = (make_batch([t.clone() for t in fused.tensors]) for _ in range(2))
    scalar = torch.tensor(multiplier, device=device)
    for zero in (False, True):
        rule = ClipRule(max_norm, zero)
        one = clip(fused, rule, p, multiplier=scalar)
        exact = norms.finish(norms.combine(ENGINE.lift(composed, p), p), p)
        two = norms.clipped(exact, p, rule, scalar)
        ENGINE.scale_(composed, two.coef, zero=zero)
        torch.testing.assert_close(one, two, rtol=1e-14, atol=0)
    torch.testing.assert_close(fused.tensors, composed.tensors, rtol=1e-14, atol=0)
    if multiplier == 1 and max_norm == 1e9:
        assert all(torch.equal(a, b) for a, b in zip(fused.tensors, before.tensors, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_multiplier_with_nonfinite_gradients(device: torch.device, bad: float) -> None:
    tensor = torch.tensor([1.0, bad, 2.0], device=device)
    scalar = torch.tensor(0.5, device=device)
    clipped = clip(make_batch([tensor]), ClipRule(1.0, True), multiplier=scalar)
    assert clipped.coef == 0
    assert not clipped.norm.isfinite()
    assert (tensor == 0).all()
