"""How memory is gone through changes no bit: streams, prefetching, threads."""

import math
from collections.abc import Iterator

import pytest
import torch

import fusedclip
from fusedclip import _extension
from fusedclip.backends import cpu

from .conftest import Engine, copies, parameters
from .test_backends import run

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# One block, several, a tile and more; with what is left over of a vector, a line, a block, a group of blocks.
SIZES = [1, 31, 64, 4097, 8192, 16_384 + 7, 32_768, 3 * 8192 + 65, 65_536, 65_537, 200_003]
PATTERNS = [(s, *ahead) for s in (1, 2, 4) for ahead in ((0, True), (512, False), (2048, False), (65536, True))]

pytestmark = pytest.mark.skipif(_extension.C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    patterns, threads = _extension.C.patterns(), torch.get_num_threads()
    yield
    _extension.C.use_patterns(*patterns)
    torch.set_num_threads(threads)


def everything(grads: list[torch.Tensor], p: float) -> list[torch.Tensor]:
    """What all passes return and write, as bits."""
    grads, results = copies(grads), []
    with fusedclip.backends.use("cpu"):
        total = fusedclip.get_total_norm(grads, p)
        stats = fusedclip.get_grad_stats(grads)
        results += [total, fusedclip.get_per_tensor_norms(grads, p), stats.norm, stats.abs_sum, stats.zeros]
        results += [
            stats.abs_max,
            stats.nonfinite,
            fusedclip.clip_grad_norm_(parameters(grads), 0.3, p),
            *copies(grads),
        ]
        fusedclip.clip_grad_value_(parameters(grads), 1e-3)
    return [bits(one) for one in [*results, *grads]]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_same_bits(dtype: torch.dtype, p: float) -> None:
    engine = Engine("cpu", "cpu")
    grads = [engine.randn(n + offset, dtype=dtype, seed=n)[offset:] for n in SIZES for offset in (0, 1)]
    grads[-1][100], grads[5][:] = 0.0, torch.finfo(dtype).tiny  # the latter is summed again in double
    torch.set_num_threads(1)
    _extension.C.use_patterns((1, 0, True), (1, 0, True))
    expected = everything(grads, p)
    for number, pattern in enumerate(PATTERNS):
        torch.set_num_threads(1 + number % 3)
        _extension.C.use_patterns(pattern, PATTERNS[-1 - number])
        found = everything(grads, p)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), pattern


@pytest.mark.parametrize(
    "asked", ["3,0,page/1,0,page", "1,0,page", "1,0,page/", "1,-5,line/1,0,line", "1,0,page/1,0,x"]
)
def test_a_variable_that_makes_no_sense_is_refused_with_the_way_out(asked: str) -> None:
    before = _extension.C.patterns()
    refusal = cpu._take_pattern(asked)
    assert refusal is not None
    assert repr(asked) in refusal
    assert "2,2048,line/1,65536,page" in refusal
    assert _extension.C.patterns() == before


def test_the_engine_is_missing_where_the_variable_makes_no_sense() -> None:
    code = (
        "import fusedclip, torch; print(fusedclip.get_total_norm([torch.ones(4)])); print(fusedclip.backends.explain())"
    )
    found = run(code, FUSEDCLIP_CPU_PATTERN="fast")
    assert "tensor(2.)" in found.stdout
    assert "FUSEDCLIP_CPU_PATTERN is 'fast'" in found.stderr
    assert "FUSEDCLIP_CPU_PATTERN is 'fast'" in found.stdout
