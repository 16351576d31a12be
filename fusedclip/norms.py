"""The algebra that every engine speaks, on fp64 tensors: lift, combine, finish; then the coefficient.

    lift     x       -> |x|^p       (|x| for p = inf and -inf, x != 0 for p = 0)
    combine  lifted  -> sum         (a max or min that keeps NaN for p = inf and -inf)
    finish   lifted  -> norm        (the p-th root, once, at the very end)

    coef = min(1, max_norm / (norm + 1e-6))

Nothing here makes the host wait for a device. `csrc/norm_ops.h` is the same page in C++.
"""

import math
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .torch_internals import refuse_dtensor

EPS = 1e-6  # torch's, in torch/nn/utils/clip_grad.py


class ClipRule(NamedTuple):
    """How a norm becomes a coefficient."""

    max_norm: float | Tensor  # inf measures: the coefficient is 1 whatever the norm
    zero_nonfinite: bool = False  # a norm that is not finite asks for zeros instead of spreading


class Clipped(NamedTuple):
    """What a clip knows when it is done: 0-d tensors on the device of the gradients.

    The coefficient may be the engine's own constant: copy it before it gets into anyone's hands.
    """

    norm: Tensor
    coef: Tensor


def check_norm_type(norm_type: SupportsFloat | str) -> float:
    """`norm_type` as a float ("inf" included, as in torch), or an error that says what it may be."""
    try:
        p = float(norm_type)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"norm_type must be a number such as 2.0 or float('inf'), got {norm_type!r} ({type(norm_type).__name__})"
        ) from None
    if math.isnan(p):
        raise ValueError("norm_type is NaN; give a number such as 2.0 or float('inf')")
    return p


def check_limit(limit: SupportsFloat | str | Tensor, name: str) -> float | Tensor:
    """`max_norm` or `total_norm`: a float that is not negative and not NaN, or a 0-d tensor left on its device.

    A tensor on the CPU is checked like a float. One on another device is not looked at, which would make the host wait.
    """
    if isinstance(limit, Tensor):
        refuse_dtensor(limit, name, "pass its .full_tensor()")
        if limit.numel() != 1 or limit.is_complex():
            shape = tuple(limit.shape)
            raise TypeError(
                f"{name} must be a number or a tensor with one real element, got {limit.dtype} of shape {shape}"
            )
        limit = limit.detach().reshape(())
        if limit.device.type != "cpu":
            return limit
    try:
        if isinstance(limit, complex):
            raise TypeError
        value = float(limit)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {limit!r} ({type(limit).__name__})") from None
    return value


def check_max_norm(max_norm: SupportsFloat | str | Tensor) -> float | Tensor:
    # A plain number, as nearly always, takes 0.4 us less this way.
    limit = max_norm if type(max_norm) is float else check_limit(max_norm, "max_norm")
    if isinstance(limit, float) and not limit >= 0:
        raise ValueError(
            f"max_norm is {limit}; it must be at least 0 (a negative one would turn gradients around; inf measures)"
        )
    return limit


def check_total_norm(total_norm: SupportsFloat | str | Tensor) -> float | Tensor:
    """As a float, or a 0-d tensor on its device. NaN and inf are answers that a norm may have."""
    limit = check_limit(total_norm, "total_norm")
    if isinstance(limit, float) and limit < 0:
        raise ValueError(f"total_norm is {limit}; a norm is at least 0")
    return limit


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """As fp64, 0-d. A number is filled in by the device itself: copying it there would make the host wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def check_clip_value(clip_value: SupportsFloat | str) -> float:
    try:
        bound = float(clip_value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"clip_value must be a number, got {clip_value!r} ({type(clip_value).__name__})") from None
    if not bound >= 0:
        raise ValueError(f"clip_value is {bound}; it must be at least 0")
    return bound


def identity(p: float) -> float:
    """The lifted value of no elements at all."""
    return math.inf if p == -math.inf else 0.0


def combine(lifted: Tensor, p: float) -> Tensor:
    """The lifted value of a whole list, 0-d, from those of its tensors, [T] with T >= 1.

    torch takes the norm of the tensors' norms; for p = 0 that counts the tensors with any non-zero element.
    """
    if p == 0:
        return (lifted != 0).sum(dtype=lifted.dtype)
    return merge(lifted, p)


def merge(lifted: Tensor, p: float) -> Tensor:
    """Lifted values of parts (devices, ranks), [K], to that of the whole, 0-d."""
    if p == math.inf:
        return lifted.amax()
    if p == -math.inf:
        return lifted.amin()
    # In order: of more than 32 Ki numbers torch.sum makes a sum per thread of the CPU, and their number would show.
    return lifted.cumsum(0)[-1] if lifted.device.type == "cpu" else lifted.sum()


def finish(lifted: Tensor, p: float) -> Tensor:
    """Lifted values to norms, elementwise."""
    if p == 2:
        return lifted.sqrt()
    if p in (0, 1) or math.isinf(p):
        return lifted
    return lifted.pow(1 / p)


def coefficient(norm: Tensor, rule: ClipRule) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), elementwise and on the norm's device; NaN stays NaN."""
    if isinstance(rule.max_norm, float):
        if rule.max_norm == math.inf:
            return torch.ones_like(norm)
        return _coefficient(norm, rule.max_norm, rule)
    limit = rule.max_norm.to(norm.device, norm.dtype)
    return torch.where(limit == math.inf, 1.0, _coefficient(norm, limit, rule))


def clipped(norm: Tensor, p: float, rule: ClipRule, multiplier: Tensor | None = None) -> Clipped:
    """The norm and the coefficient that clips to the rule.

    With a multiplier (an inverse loss scale), they are the norm of gradients yet to be multiplied by it, and the
    coefficient that multiplies as well. For p = 0 the norm is a count, which multiplying leaves alone.
    """
    if multiplier is None:
        return Clipped(norm, coefficient(norm, rule))
    multiplier = multiplier.to(norm.device, norm.dtype, non_blocking=True)
    norm = norm if p == 0 else norm * multiplier
    return Clipped(norm, coefficient(norm, rule) * multiplier)


def shows_nonfinite(p: float, dtype: torch.dtype) -> bool:
    """Whether the lifted value is finite exactly if all gradients are.

    Orders 0 and -inf hide an inf, negative ones turn it into 0; powers may leave the range of fp64, and so do the sums
    and squares of fp64 gradients (`dtype` is that of results: fp64 if any gradient is).
    """
    return p == math.inf or (p in (1, 2) and dtype != torch.float64)


def _coefficient(norm: Tensor, limit: float | Tensor, rule: ClipRule) -> Tensor:
    coef = (limit / (norm + EPS)).clamp(max=1.0)
    if rule.zero_nonfinite:
        coef = torch.where(norm.isfinite(), coef, 0.0)
    return coef
