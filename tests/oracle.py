"""What is right, independent of every engine: NumPy in extended precision (fp64 on arm64), from the gradients' bits."""

import math

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
LEAST_EXPONENT = {torch.float64: -1022, torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}


def exact(tensor: Tensor) -> np.ndarray:
    """The elements' magnitudes and signs, flat, in NumPy's widest float; complex ones as their modulus."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()  # where it lives: each device rounds sums of 16-bit values in its own way
    tensor = tensor.cpu()
    if tensor.is_complex():
        pairs = torch.view_as_real(tensor.resolve_conj()).double().numpy().astype(np.longdouble)
        return np.sqrt((pairs**2).sum(-1)).ravel()
    return tensor.resolve_neg().double().numpy().astype(np.longdouble).ravel()


def lifted(x: np.ndarray, p: float) -> np.longdouble:
    x = np.abs(x)
    if x.size == 0:
        return np.longdouble(math.inf if p == -math.inf else 0)
    if p == math.inf:
        return np.max(x)  # NaN propagates
    if p == -math.inf:
        return np.min(x)
    if p == 0:
        return np.longdouble(np.count_nonzero(x))
    with np.errstate(all="ignore"):
        return np.sum(x * x if p == 2 else x**p)


def root(value: np.longdouble, p: float) -> np.longdouble:
    if p in (0, 1) or math.isinf(p):
        return value
    with np.errstate(all="ignore"):
        return np.sqrt(value) if p == 2 else value ** (np.longdouble(1) / np.longdouble(p))


def norm(tensors: list[Tensor], p: float = 2.0) -> float:
    """The norm of all elements together; for p = 0 torch's: how many tensors have any non-zero element."""
    each = [lifted(exact(t), p) for t in tensors]
    if p == 0:
        return float(sum(value != 0 for value in each))
    if math.isinf(p):
        return float(np.max(each) if p > 0 else np.min(each))
    return float(root(np.sum(each), p))


def coefficient(norm: float, max_norm: float) -> float:
    if max_norm == math.inf:
        return 1.0
    ratio = max_norm / (norm + 1e-6)
    return 1.0 if ratio >= 1 else ratio  # NaN stays


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` at these magnitudes."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(values)))
    return 2.0 ** (np.maximum(exponent, LEAST_EXPONENT[dtype]) - MANTISSA_BITS[dtype])


def assert_scaled(after: Tensor, before: Tensor, coef: float, ulps: float) -> None:
    """Every element of `after` is that of `before` times `coef`, within `ulps` of its dtype; NaN and inf in kind."""
    assert after.dtype == before.dtype
    with np.errstate(invalid="ignore"):  # inf * 0
        got, want = exact(after), exact(before) * np.longdouble(coef)
    finite = np.isfinite(want)
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (got[np.isinf(want)] == want[np.isinf(want)]).all()
    error = np.abs(got[finite] - want[finite]) / ulp(want[finite], after.dtype)
    assert (error <= ulps).all(), f"off by {error.max()} ulp"


def assert_close(value: float | Tensor, expected: float, relative: float) -> None:
    """NaN equals NaN alone; inf equals inf alone; otherwise within a relative bound."""
    value = float(value)
    if math.isnan(expected):
        assert math.isnan(value), value
    elif math.isinf(expected) or expected == 0:
        assert value == expected, (value, expected)
    else:
        assert abs(value / expected - 1) <= relative, (value, expected, value / expected - 1)
