"""Any list of gradients against the oracle: hypothesis draws shapes, dtypes, layouts, special values and norm types."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedclip

from . import oracle
from .conftest import EXAMPLES, Engine, parameters

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [
    0.0, -0.0, 1.0, -1.0, 1e-45, 6e-8, 1e-38, 1e-20, 1e-7, 3e4, 65504.0, 1e19, 3e38, math.inf, -math.inf, math.nan,
]  # fmt: skip
# The engine fixture holds for all examples; drawing large gradients takes its time.
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
NORM_TYPES = [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, 0.5, 1.7]

counts = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 1000, 8191, 8192, 8193]))


@dataclass(frozen=True, eq=False)
class Drawn:
    """A gradient yet to be laid out: one that is moved to a device arrives there aligned, contiguous and ordinary."""

    values: torch.Tensor
    count: int
    layout: str

    def on(self, device: str) -> torch.Tensor:
        """A new one."""
        values, n = self.values.to(device, copy=True), self.count
        if self.layout == "misaligned":
            return values[1 : n + 1]
        if self.layout == "strided":
            return values[: 2 * n : 2]
        if self.layout == "transposed" and n % 2 == 0:
            return values[:n].view(2, n // 2).t()
        if self.layout == "complex" and values.dtype in (torch.float32, torch.float64):
            return torch.view_as_complex(values[: 2 * n].view(n, 2))
        if self.layout == "inference":
            with torch.inference_mode():
                return values[: 2 * n].clone()[::2]
        if self.layout in ("sparse", "hybrid") and n:  # rows, as an embedding's gradient has them, some of them twice
            rows = torch.randint(0, n, (1, n), generator=torch.Generator().manual_seed(n)).to(device)
            shape = (n, 2) if self.layout == "hybrid" else (n,)
            return torch.sparse_coo_tensor(rows, values[: math.prod(shape)].view(shape), shape, check_invariants=False)
        return values[:n]


LAYOUTS = ["contiguous", "misaligned", "strided", "transposed", "complex", "sparse", "hybrid", "inference"]


@st.composite
def gradients(draw: st.DrawFn) -> Drawn:
    """Ordinary values at some scale, a few special ones, in some layout."""
    dtype, count = draw(st.sampled_from(DTYPES)), draw(counts)
    scale = 10.0 ** draw(st.integers(-25, 25) if dtype != torch.float16 else st.integers(-6, 3))
    values = torch.randn(2 * count + 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * scale
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
        values[draw(st.integers(0, 2 * count + 2))] = value
    return Drawn(values.to(dtype), count, draw(st.sampled_from(LAYOUTS)))


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """What there is to scale: a sparse gradient's coalesced values, a complex one's parts."""
    tensor = tensor.coalesce().values().clone() if tensor.is_sparse else tensor.clone()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def bound(tensors: list[torch.Tensor], p: float) -> float:
    return 3e-6 if p >= 1 or p <= 0 else 3e-6 / p


@settings(suppress_health_check=UNCHECKED)
@given(
    drawn=st.lists(gradients(), max_size=5),
    p=st.sampled_from(NORM_TYPES),
    fraction=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, math.inf]),
    on_nonfinite=st.sampled_from(["propagate", "zero"]),
)
def test_clip_grad_norm(engine: Engine, drawn: list[Drawn], p: float, fraction: float, on_nonfinite: str) -> None:
    grads = [g.on(engine.device) for g in drawn]
    before = [elements(g) for g in grads]
    expected = oracle.norm(grads, p) if grads else 0.0
    max_norm = math.inf if fraction == math.inf else fraction * (expected if math.isfinite(expected) else 1.0)
    norm = fusedclip.clip_grad_norm_(parameters(grads), max_norm, p, on_nonfinite=on_nonfinite)  # type: ignore[arg-type]

    double = any(b.dtype == torch.float64 for b in before)
    halves = any(b.dtype in (torch.float16, torch.bfloat16) for b in before)
    assert norm.dtype == (torch.float64 if double else torch.float32)
    visible = expected if double else float(torch.tensor(expected, dtype=torch.float64).float())
    if not math.isinf(visible) or math.isinf(expected):
        oracle.assert_close(norm, visible, bound(grads, p) if visible > 1e-37 else 1e-2)
    if fraction == 1.0 and p not in (0.0, math.inf, -math.inf):
        return  # whether the coefficient is 1 or just below hangs on the last bits of the norm
    coef = oracle.coefficient(expected, max_norm)
    for after, b in zip(grads, before, strict=True):
        if on_nonfinite == "zero" and max_norm != math.inf and (coef == 0 or not math.isfinite(expected)):
            assert (elements(after) == 0).all()
        else:
            ulps = 1.5 if b.dtype not in (torch.float16, torch.bfloat16) else engine.ulps(b.dtype)
            # Elements inherit the norm's error; where nothing is summed in float, that is next to none.
            inherited = bound(grads, p) if engine.name not in ("cpu", "reference") or halves else 1e-12
            relative = 2 * inherited / float(torch.finfo(b.dtype).eps)
            oracle.assert_scaled(elements(after), b, coef, ulps + (relative if coef != 1 else 0))


@settings(suppress_health_check=UNCHECKED, max_examples=min(300, EXAMPLES))
@given(drawn=st.lists(gradients(), max_size=4), value=st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 1.0, 1e9, math.inf]))
def test_clip_grad_value(engine: Engine, drawn: list[Drawn], value: float) -> None:
    grads = [g for g in (d.on(engine.device) for d in drawn) if not g.is_complex()]
    expected = [elements(g).double().clamp(-value, value).to(g.dtype) for g in grads]
    fusedclip.clip_grad_value_(parameters(grads), value)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(elements(got), want, rtol=0, atol=0, equal_nan=True)


@settings(suppress_health_check=UNCHECKED, max_examples=min(300, EXAMPLES))
@given(drawn=st.lists(gradients(), min_size=1, max_size=5), p=st.sampled_from(NORM_TYPES))
def test_per_tensor_norms(engine: Engine, drawn: list[Drawn], p: float) -> None:
    grads = [g.on(engine.device) for g in drawn]
    norms = fusedclip.get_per_tensor_norms(grads, p)
    for got, tensor in zip(norms, grads, strict=True):
        x = oracle.exact(tensor)
        expected = torch.tensor(float(oracle.root(oracle.lifted(x, p), p)), dtype=torch.float64)
        visible = float(expected.to(norms.dtype))
        if not (math.isinf(visible) and not math.isinf(float(expected))):
            oracle.assert_close(got, visible, bound(grads, p) if visible > 1e-37 else 1e-2)


def test_this_file_can_fail(engine: Engine) -> None:
    grad = engine.randn(100)
    with pytest.raises(AssertionError):
        oracle.assert_scaled(grad * (1 + 4e-7), grad, 1.0, 1.5)
    with pytest.raises(AssertionError):
        oracle.assert_close(math.nan, 1.0, 1.0)
