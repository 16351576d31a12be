"""The CUDA engine's two forms, of two launches and of one that keeps gradients on the chip: they have to agree.

On a GPU, and executed by the host shim (test_cuda_shim.py), whose chip holds a few hundred elements.
"""

import math

import pytest
import torch
from torch import Tensor

from fusedclip.backends import cuda
from fusedclip.gradients import Batch
from fusedclip.norms import Clipped, ClipRule

from . import oracle
from .conftest import Engine, copies, engines

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMS = {"two launches": cuda.TWO_LAUNCHES, "on chip": cuda.ON_CHIP}
pytestmark = engines("cuda")


def mixed(engine: Engine) -> list[Tensor]:
    """Every dtype and size that fits, aligned and not."""
    sizes = [1, 7, 4096, 70_001, 300_000] if engine.device == "cuda" else [1, 7, 40]
    return [
        engine.randn(size + shift, dtype=dtype, seed=size)[shift:]
        for dtype in DTYPES
        for size in sizes
        for shift in (0, 1)
    ]


def clip(form: int, grads: list[Tensor], p: float, max_norm: float, multiplier: Tensor | None = None) -> Clipped:
    engine = cuda.Cuda()
    engine.form = form
    batch = Batch(grads, grads[0].device)
    assert form != cuda.ON_CHIP or cuda._C.cuda_fits_on_chip(batch.table, p)
    return engine.clip_(batch, p, ClipRule(max_norm), torch.float64, multiplier=multiplier)[0]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -math.inf])
@pytest.mark.parametrize("fraction", [0.3, 2.0])
def test_both_forms(engine: Engine, form: int, p: float, fraction: float) -> None:
    grads = mixed(engine)
    before = copies(grads)
    expected = oracle.norm(before, p)
    clipped = clip(form, grads, p, expected * fraction)
    oracle.assert_close(clipped.norm, expected, 3e-6)
    oracle.assert_close(clipped.coef, oracle.coefficient(expected, expected * fraction), 3e-6)
    for after, b in zip(grads, before, strict=True):
        coef = clipped.coef.to(torch.float64 if b.dtype == torch.float64 else torch.float32)
        assert torch.equal(after, (b.to(coef.dtype) * coef).to(b.dtype))


def test_they_agree_to_the_last_bits_of_a_float(engine: Engine) -> None:
    grads = [engine.randn(n, seed=n) for n in ((5_000_000, 1000, 3) if engine.device == "cuda" else (200, 3))]
    norms = [clip(form, copies(grads), 2.0, 1.0).norm for form in (cuda.TWO_LAUNCHES, cuda.ON_CHIP, cuda.TWO_LAUNCHES)]
    assert norms[0] == norms[2]  # bit by bit
    oracle.assert_close(norms[1], float(norms[0]), 1e-7)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_multiplier_is_part_of_norm_and_coefficient(engine: Engine, form: int) -> None:
    grads = mixed(engine)
    expected = oracle.norm(grads) / 64
    clipped = clip(form, grads, 2.0, expected / 2, engine.tensor(1 / 64))
    oracle.assert_close(clipped.norm, expected, 3e-6)
    oracle.assert_close(clipped.coef, oracle.coefficient(expected, expected / 2) / 64, 3e-6)
