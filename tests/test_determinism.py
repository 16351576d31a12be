"""The same gradients give the same bits: run after run, for any number of threads and any instruction set."""

import math
from collections.abc import Iterator

import pytest
import torch

import fusedclip
from fusedclip import _extension, passes
from fusedclip.backends import serving
from fusedclip.gradients import gather
from fusedclip.norms import ClipRule

from .conftest import Engine, parameters

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(_extension.C is None, reason="the extension is not built")


def mixed(e: Engine) -> list[torch.Tensor]:
    shapes = [1, 63, 64, 65, 8191, 8193, 65536, 65537, 1_000_003, 300_000]
    return [e.randn(n, dtype=FLOATING[i % 4], seed=i) for i, n in enumerate(shapes)]


def test_run_after_run(engine: Engine) -> None:
    results = []
    for _ in range(5):
        grads = mixed(engine)
        norms = [fusedclip.get_total_norm(grads), fusedclip.clip_grad_norm_(parameters(grads), 1.0)]
        results.append([*norms, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
def test_number_of_threads(p: float) -> None:
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        with fusedclip.backends.use("cpu"):
            grads = mixed(Engine("cpu", "cpu"))
            norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0, p)
            results.append(
                [norm, fusedclip.get_total_norm(grads, p), *fusedclip.get_per_tensor_norms(grads, p), *grads]
            )
            fusedclip.clip_grad_value_(parameters(grads), 1e-3)
            results[-1] += [g.clone() for g in grads]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, 3.0, math.inf, -math.inf])
def test_whole_lists_and_batches(p: float) -> None:
    whole, batched = mixed(Engine("cpu", "cpu")), mixed(Engine("cpu", "cpu"))
    with fusedclip.backends.use("cpu"):
        assert torch.is_tensor(fusedclip.backends.for_lists().clip_list_(whole, None, p, ClipRule(math.inf), False, []))
        total = fusedclip.get_total_norm(whole, p)
        norm = fusedclip.clip_grad_norm_(parameters(whole), 1.0, p)
        (batch,) = gather(batched, None).reads
        assert torch.equal(serving(batch).norm(batch, p, torch.float64), total)
        clipped = passes.clip_(gather(parameters(batched)), p, ClipRule(1.0))
    assert all(torch.equal(a, b) for a, b in zip([norm, *whole], [clipped.norm, *batched], strict=True))


@compiled
@pytest.mark.usefixtures("threads")
def test_more_tensors_than_torch_sums_in_one_go() -> None:
    grads = list(torch.randn(100_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind())
    grads[0] = torch.ones(8, dtype=torch.float64)[::2]  # a layout that takes the road through batches
    results = set()
    with fusedclip.backends.use("cpu"):
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            exact = fusedclip.get_total_norm(grads, 1.0, error_if_nonfinite=True)
            results |= {exact.item(), fusedclip.get_total_norm(grads, 1.0).item()}
    assert len(results) == 1


@compiled
@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, 3.0, math.inf, -math.inf])
def test_instruction_sets(p: float) -> None:
    results = []
    names = _extension.C.instruction_sets()
    try:
        for name in names:
            _extension.C.use_instruction_set(name)
            with fusedclip.backends.use("cpu"):
                grads = mixed(Engine("cpu", "cpu"))
                norms = [fusedclip.get_total_norm([g], p) for g in grads]
                fusedclip.clip_grad_norm_(parameters(grads), 1.0, p)
                clamped = [g.clone() for g in grads]
                fusedclip.clip_grad_value_(parameters(clamped), 1e-3)
                results.append([*norms, *grads, *clamped])
    finally:
        _extension.C.use_instruction_set(names[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_every_half_is_read_and_rounded_alike_by_every_instruction_set() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    names = _extension.C.instruction_sets()
    for dtype in (torch.float16, torch.bfloat16):
        halves = every.view(dtype)
        finite = halves.isfinite()
        for scale in (0.3, 1e-3, 0.9995):
            expected = (halves.float() * scale).to(dtype)[finite].view(torch.int16)
            first = None
            for name in names:
                _extension.C.use_instruction_set(name)
                try:
                    got = halves.clone()
                    with fusedclip.backends.use("cpu"):
                        fusedclip.clip_grads_with_norm_(parameters([got]), scale, 1.0 - 1e-6)
                finally:
                    _extension.C.use_instruction_set(names[0])
                bits = got.view(torch.int16)
                assert torch.equal(bits[finite], expected), (dtype, scale, name)
                first = bits if first is None else first
                # A NaN's payload too; but of fp16 only the processor's own conversion keeps that.
                alike = ~halves.isnan() if dtype is torch.float16 else slice(None)
                assert torch.equal(bits[alike], first[alike]), (dtype, scale, name)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flushing_of_subnormals_changes_nothing(dtype: torch.dtype) -> None:
    value = {torch.float32: 1e-40, torch.bfloat16: 1e-39, torch.float16: 1e-7}[dtype]
    grads = [torch.full((1 << 22,), value, dtype=dtype), torch.full((100,), value, dtype=dtype)]
    expected = fusedclip.get_total_norm(grads)
    assert expected > 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        norm = fusedclip.get_total_norm(grads)
        fusedclip.clip_grads_with_norm_(parameters(grads), 0.5, 1.0 - 1e-6)
    finally:
        torch.set_flush_denormal(False)
    assert norm == expected
    halved = torch.tensor(value, dtype=dtype) / 2
    assert all((g == halved).all() for g in grads)


def subnormal_lists() -> dict[str, list[torch.Tensor]]:
    """Lists whose norm, or whose way to it, is in the subnormals of float32."""
    tiny = torch.full((4,), 1e-40)
    pairs = torch.view_as_complex(torch.full((40_000, 2), 1e-40))
    places = torch.tensor([[1, 3, 1]])
    return {
        "the norm itself": [tiny],
        "a strided companion": [tiny, torch.full((8,), 1e-40)[::2]],
        "complex": [pairs],
        "sparse": [torch.sparse_coo_tensor(places, torch.full((3, 8), 1e-40), (5, 8), check_invariants=True)],
    }


@compiled
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("name", subnormal_lists())
def test_flushing_changes_no_norm_on_any_road(name: str, p: float) -> None:
    tensors = subnormal_lists()[name]

    def norms() -> list[int]:
        found = [
            fusedclip.get_total_norm(tensors, p),
            fusedclip.get_total_norm(tensors, p, error_if_nonfinite=True),
            *fusedclip.get_per_tensor_norms(tensors, p),
        ]
        return [norm.view(torch.int32).item() for norm in found]  # bits: reading a subnormal would flush it

    expected = norms()
    assert all(bits > 0 for bits in expected)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert norms() == expected
    finally:
        torch.set_flush_denormal(False)


@compiled
def test_what_torch_was_told_of_subnormals_stays_as_it_was() -> None:
    def flushes() -> bool:
        return bool((torch.full((100_000,), 1e-40) * 1 == 0).any())

    odd = [torch.full((40_000,), 1 + 1j)[::2], torch.ones(3)]
    fusedclip.get_total_norm(odd, 1.0)
    assert not flushes()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        fusedclip.get_total_norm(odd, 1.0)
        assert flushes()
    finally:
        torch.set_flush_denormal(False)
