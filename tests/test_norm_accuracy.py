"""The norm against extended precision: large lists, constants, zeros, vanishing and overflowing squares."""

import math

import pytest
import torch

import fusedclip

from . import oracle
from .conftest import Engine

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORM_TYPES = [1.0, 2.0, math.inf, -math.inf, 0.0, 0.5, 3.0, 2.7]
BOUND = 3e-6


def check(tensors: list[torch.Tensor], p: float = 2.0, bound: float = BOUND) -> None:
    oracle.assert_close(fusedclip.get_total_norm(tensors, p), oracle.norm(tensors, p), bound)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", NORM_TYPES)
def test_every_norm_of_every_dtype(engine: Engine, p: float, dtype: torch.dtype) -> None:
    check([engine.randn(n, dtype=dtype, seed=n) for n in (1, 7, 64, 257, 5000, 70000)], p)


def test_sixteen_million_elements(engine: Engine) -> None:
    if engine.name == "triton" and engine.device == "cpu":
        pytest.skip("the interpreter would take minutes; 2^20 elements are checked elsewhere")
    check([engine.randn(1 << 24) * 1e-3], bound=1e-7)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [1e-3, 0.1, 1 / 3, 3.0])
def test_constant_gradients(engine: Engine, dtype: torch.dtype, value: float) -> None:
    # Every addition of a float sum rounds the same way here: the worst case for few and long chains.
    check([torch.full((300_000,), value, dtype=dtype, device=engine.device)])


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_small_elements_beside_large_ones(engine: Engine, dtype: torch.dtype, p: float) -> None:
    # A one, then terms of 2^-24, in every lane of the sum: each addition in fp32 loses its term. Lanes are neighbours
    # for the CPU and Triton, and the first halves of 16-byte packs of neighbouring threads for CUDA.
    count, place = 32768, torch.arange(32768)
    tensors = []
    for period in (1024, 2048, 8192, 16384, 32768):
        for width in (16, 64, 128, 512, 1024, 4096):
            for of_pack in (4, 8):
                tensor = torch.full((count,), 2.0 ** (-24 / p), dtype=dtype)
                tensor[(place % period < width) & (place % 8 < of_pack)] = 1
                tensors.append(tensor.to(engine.device))
    norms = fusedclip.get_per_tensor_norms(tensors, p)
    for norm, tensor in zip(norms, tensors, strict=True):
        oracle.assert_close(norm, oracle.norm([tensor], p), BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-23, 3e-20, 1e-19, 1e-16, 1e19, 1e30, 1e33])
def test_squares_that_vanish_or_overflow(engine: Engine, dtype: torch.dtype, p: float, scale: float) -> None:
    tensors = [engine.randn(n, seed=n).mul(scale).to(dtype) for n in (5, 9000, 66000)]
    oracle.assert_close(
        fusedclip.get_total_norm(tensors, p), float(torch.tensor(oracle.norm(tensors, p)).float()), BOUND
    )


@pytest.mark.parametrize("sum_of_squares", [1e-38, 1.2e-38, 1e-37, 1e-36, 1e-33, 1e-28, 1e-27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_are_barely_normal(engine: Engine, dtype: torch.dtype, sum_of_squares: float) -> None:
    for count in (1, 100, 8192, 65536):
        check([torch.full((count,), math.sqrt(sum_of_squares / count), dtype=dtype, device=engine.device)])


@pytest.mark.parametrize("dtype", FLOATING)
def test_zeros_among_ordinary_tiles(engine: Engine, dtype: torch.dtype) -> None:
    zeros = torch.zeros(200_000, dtype=dtype, device=engine.device)
    assert fusedclip.get_total_norm([zeros]) == 0
    zeros[150_001] = 2.0
    check([zeros, engine.randn(10, dtype=dtype)])
    negative = -torch.zeros(100, dtype=dtype, device=engine.device)
    assert math.copysign(1, fusedclip.get_total_norm([negative], math.inf)) == 1


@pytest.mark.parametrize("p", NORM_TYPES)
def test_mixed_dtypes_in_one_list(engine: Engine, p: float) -> None:
    tensors = [engine.randn(1000 + i, dtype=dtype, seed=i) for i, dtype in enumerate(FLOATING * 2)]
    check(tensors, p)
    assert fusedclip.get_total_norm(tensors, p).dtype == torch.float64
    assert fusedclip.get_total_norm(tensors[:1] + tensors[2:4], p).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_is_not_rounded_to_the_gradients_dtype(engine: Engine, dtype: torch.dtype) -> None:
    tensors = [engine.randn(1000, dtype=dtype, seed=i) for i in range(20)]
    norm = fusedclip.get_total_norm(tensors)
    assert norm.dtype == torch.float32
    oracle.assert_close(norm, oracle.norm(tensors), 1e-6)
    assert norm != norm.to(dtype)  # torch's answer


def test_fp16_norm_beyond_the_range_of_fp16(engine: Engine) -> None:
    check([torch.full((4,), 60000.0, dtype=torch.float16, device=engine.device)])


@pytest.mark.parametrize("p", [-1.0, -2.5])
def test_negative_orders(engine: Engine, p: float) -> None:
    tensors = [engine.randn(300, seed=i).abs().add(0.1) for i in range(3)]
    check(tensors, p)
    tensors[1][7] = 0.0
    assert fusedclip.get_total_norm(tensors, p) == 0
