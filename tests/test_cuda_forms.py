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
FORMS = ("two launches", "on chip")
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


def clip(form: str, grads: list[Tensor], p: float, max_norm: float, multiplier: Tensor | None = None) -> Clipped:
    batch = Batch(grads, grads[0].device)
    assert form != "on chip" or cuda._C.cuda_fits_on_chip(batch.table, p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "form", form)
        return cuda.Cuda().clip_(batch, p, ClipRule(max_norm), torch.float64, multiplier=multiplier)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, -math.inf])
@pytest.mark.parametrize("fraction", [0.3, 2.0])
def test_both_forms(engine: Engine, form: str, p: float, fraction: float) -> None:
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
    norms = [clip(form, copies(grads), 2.0, 1.0).norm for form in (*FORMS, FORMS[0])]
    assert norms[0] == norms[2]  # bit by bit
    oracle.assert_close(norms[1], float(norms[0]), 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_multiplier_is_part_of_norm_and_coefficient(engine: Engine, form: str) -> None:
    grads = mixed(engine)
    expected = oracle.norm(grads) / 64
    clipped = clip(form, grads, 2.0, expected / 2, engine.tensor(1 / 64))
    oracle.assert_close(clipped.norm, expected, 3e-6)
    oracle.assert_close(clipped.coef, oracle.coefficient(expected, expected / 2) / 64, 3e-6)


def test_a_form_that_there_is_not(engine: Engine) -> None:
    grads = [engine.randn(5)]
    with pytest.raises(ValueError, match=r"form is 'two'; there are 'auto', 'two launches', 'on chip'"):
        clip("two", grads, 2.0, 1.0)


def test_what_does_not_fit_on_chip_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [engine.randn(2**30 // 4 if engine.device == "cuda" else 2**20)]
    before = copies(grads)
    monkeypatch.setattr(cuda, "form", "on chip")
    with pytest.raises(RuntimeError, match="do not fit on the chip"):
        cuda.Cuda().clip_(Batch(grads, grads[0].device), 2.0, ClipRule(1.0), torch.float64)
    assert torch.equal(grads[0], before[0])
