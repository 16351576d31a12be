"""The CPU engine: `csrc/cpu`, on torch's threads."""

import math
from collections.abc import Set

import torch
from torch import Tensor

from .. import _extension
from ..grads import FLOATING, Batch, mark_written
from ..norms import EPS, Clipped, ClipRule
from .base import Backend

_C = _extension.C
_ONE = torch.ones((), dtype=torch.float64, device="cpu")
_MOST_FLOAT32 = torch.finfo(torch.float32).max


class Cpu(Backend):
    name = "cpu"

    def missing(self) -> str | None:
        return _extension.reason

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"it serves the CPU, not {device.type}"
        unknown = dtypes - FLOATING
        return f"it does not know {', '.join(sorted(map(str, unknown)))}" if unknown else None

    def lift(self, batch: Batch, p: float) -> Tensor:
        out = torch.empty(len(batch.tensors), dtype=torch.float64, device="cpu")
        _C.cpu_lift(batch.table, p, torch.get_num_threads(), out.data_ptr())
        return out

    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> None:
        coef = coef.contiguous()
        if _C.cpu_scale(batch.table, coef.data_ptr(), coef.dim() == 1, zero, torch.get_num_threads()):
            batch.mark_written((coef != 1).tolist() if coef.dim() == 1 else None)

    def clamp_(self, batch: Batch, bound: float) -> None:
        if _C.cpu_clamp(batch.table, bound, torch.get_num_threads()):
            batch.mark_written()

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        return self.clip_(batch, p, ClipRule(math.inf), dtype).norm  # without a limit nothing is written

    def clip_(
        self, batch: Batch, p: float, rule: ClipRule, dtype: torch.dtype, *, multiplier: Tensor | None = None
    ) -> Clipped:
        factor = _ONE if multiplier is None else multiplier.double()
        threads = torch.get_num_threads()
        norm, coef = _C.cpu_clip(
            batch.table, p, float(rule.max_norm), EPS, rule.zero_nonfinite, factor.data_ptr(), threads
        )
        if coef == 1:
            return Clipped(_scalar(norm, dtype), _ONE)  # making a tensor costs 1 us
        batch.mark_written()
        return Clipped(_scalar(norm, dtype), _scalar(coef, torch.float64))

    def clip_list_(
        self, items: list[Tensor], attribute: str | None, p: float, max_norm: float, zero_nonfinite: bool
    ) -> Tensor | None:
        if _C is None:
            return None
        clipped = _C.cpu_clip_list(items, attribute, p, max_norm, EPS, zero_nonfinite, torch.get_num_threads())
        if clipped is None:
            return None
        norm, coef, is_double, tensors = clipped
        if coef != 1:
            mark_written(tensors)
        return _scalar(norm, torch.float64 if is_double else torch.float32)


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and value > _MOST_FLOAT32:
        value = math.inf  # scalar_tensor would raise
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")
