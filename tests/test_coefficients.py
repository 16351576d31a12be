"""The write pass with every coefficient that it may meet: every product that the dtype has comes out right."""

import math

import pytest
import torch

import fusedclip
from fusedclip import backends, norms
from fusedclip.gradients import Batch, gather

from . import oracle
from .conftest import Engine, copies, engines, parameters

NORM = 1.0 - 1e-6  # with torch's 1e-6 added it is 1, so that the limit is the coefficient
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def every_kind_of(dtype: torch.dtype) -> torch.Tensor:
    """Random bits: all exponents alike, subnormals, inf and NaN. All there are of a 16-bit dtype."""
    integer = INTEGERS[dtype.itemsize]
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(integer).view(dtype)
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(limits.min, limits.max, (20_000,), dtype=integer, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_exponent_of_the_coefficient(engine: Engine, dtype: torch.dtype) -> None:
    before = every_kind_of(dtype).to(engine.device)
    # The coefficient and the product are rounded to fp32 on GPUs, which an fp32 element feels.
    ulps = 1.5 if dtype == torch.float32 else 0.51
    for exponent in [*range(1, 290, 9), 400, 600, 1000]:
        coef = math.ldexp(1.37, -exponent)
        after = before.clone()
        fusedclip.clip_grads_with_norm_(parameters([after]), coef, NORM)
        oracle.assert_scaled(after, before, coef, ulps)


def test_the_largest_bfloat16_down_to_the_least(engine: Engine) -> None:
    grads = [torch.full((100,), 2.0**127, dtype=torch.bfloat16, device=engine.device)]
    for exponent in range(213, 261):  # 2^-213 and below came out as 0
        clipped = copies(grads)
        fusedclip.clip_grads_with_norm_(parameters(clipped), 2.0**-exponent, NORM)
        assert (clipped[0].double() == 2.0 ** (127 - exponent)).all(), exponent


@engines("cpu", "cuda", "triton")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
def test_the_read_pass_may_be_over(engine: Engine, p: float, zeros: bool) -> None:
    """As where other ranks have entered the lifted value, which here is that of a norm three times as large."""
    backend = backends.serving(Batch([engine.randn(1)], torch.device(engine.device)))
    batch = gather(parameters([engine.randn(70), engine.randn(9, dtype=torch.bfloat16)]), p=p).reads[0]
    before, lifted = copies(batch.tensors), norms.combine(backend.lift(batch, p), p)
    norm = 3 * norms.finish(lifted, p)
    rule = norms.ClipRule(0.0 if zeros else 1.0, zero_nonfinite=zeros)
    clipped, written = backend.clip_(batch, p, rule, torch.float64, lifted=lifted * (3 if math.isinf(p) else 3.0**p))
    assert written
    torch.testing.assert_close(clipped.norm, norm, rtol=1e-6, atol=0)
    for after, gradient in zip(batch.tensors, before, strict=True):
        oracle.assert_scaled(after, gradient, float(rule(norm)), engine.ulps(gradient.dtype))
