"""The write pass with every coefficient that it may meet: every product that the dtype has comes out right."""

import math

import pytest
import torch

import fusedclip

from . import oracle
from .conftest import Engine, copies, parameters

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
