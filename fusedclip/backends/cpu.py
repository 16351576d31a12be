"""The CPU engine: `csrc/cpu`, on torch's threads."""

import math
import os
import re
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..dtypes import unknown
from ..gradients import Batch
from ..norms import STATS, Clipped, ClipRule
from ..updates import UpdateRule
from .base import Backend, Written
from .updater import CompiledUpdater, Streams

_C = _extension.C
_ONE = torch.ones((), dtype=torch.float64, device="cpu")
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_HERE = torch.device("cpu")  # whatever the default device is; as a string it would be read each time


_PATTERN = re.compile(r"([124]),(\d{1,6}),(line|page)")


def _take_pattern(asked: str | None) -> str | None:
    """What FUSEDCLIP_CPU_PATTERN asks for in place of the processor's own; the reason if it cannot be."""
    if not asked or _C is None:
        return None
    read, _, write = asked.partition("/")
    ways = _PATTERN.fullmatch(read), _PATTERN.fullmatch(write)
    if not ways[0] or not ways[1]:
        return (
            f"FUSEDCLIP_CPU_PATTERN is {asked!r}; it wants READ/WRITE, each the number of streams (1, 2, 4), how many "
            "bytes ahead to ask for memory (up to 6 digits), and line or page, as in 2,2048,line/1,65536,page"
        )
    _C.use_patterns(*((int(way[1]), int(way[2]), way[3] == "page") for way in ways if way))
    return None


_bad_pattern = _take_pattern(os.environ.get("FUSEDCLIP_CPU_PATTERN"))


class CpuUpdater(CompiledUpdater):
    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        _C.cpu_update(
            streams.table, kind=rules[0].kind, rules=rules, coefs=coefs, skip=skip, threads=torch.get_num_threads()
        )


class Cpu(Backend):
    name = "cpu"
    takes_lists = True
    counts_writes = True
    updater = CpuUpdater()

    def missing(self) -> str | None:
        return _extension.reason or _bad_pattern

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"it serves the CPU, not {device.type}"
        return unknown(dtypes)

    def lift(self, batch: Batch, p: float) -> Tensor:
        out = torch.empty(len(batch.tensors), dtype=torch.float64, device="cpu")
        _C.cpu_lift(batch.table, p=p, threads=torch.get_num_threads(), out=out)
        return out

    def stats(self, batch: Batch) -> Tensor:
        out = torch.empty(STATS, len(batch.tensors), dtype=torch.float64, device="cpu")
        _C.cpu_stats(batch.table, threads=torch.get_num_threads(), out=out)
        return out

    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> Written:
        written: bool = _C.cpu_scale(
            batch.table, coef=coef.contiguous(), per_tensor=coef.dim() == 1, zero=zero, threads=torch.get_num_threads()
        )
        if not written or not coef.dim():
            return written
        scaled = coef != 1
        return True if scaled.all() else scaled.tolist()

    def clamp_(self, batch: Batch, bound: float) -> Written:
        written: Written = _C.cpu_clamp(batch.table, bound=bound, threads=torch.get_num_threads())
        return written

    def fuses(self, p: float) -> bool:
        return True

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        return self.clip_(batch, p, ClipRule(math.inf), dtype)[0].norm  # without a limit nothing is written

    def clip_(
        self,
        batch: Batch,
        p: float,
        rule: ClipRule,
        dtype: torch.dtype,
        *,
        multiplier: Tensor | None = None,
        lifted: Tensor | None = None,
    ) -> tuple[Clipped, Written]:
        factor = _ONE if multiplier is None else multiplier.double()
        if isinstance(rule.max_norm, Tensor):
            rule = rule._replace(max_norm=rule.max_norm.item())  # waits, if it is on a device
        norm, coef = _C.cpu_clip(
            batch.table, p=p, rule=rule, multiplier=factor, lifted=lifted, threads=torch.get_num_threads()
        )
        if coef == 1:
            return Clipped(_scalar(norm, dtype), _ONE), False  # making a tensor costs 1 us
        return Clipped(_scalar(norm, dtype), _scalar(coef, torch.float64)), True

    def clip_list_(
        self,
        items: list[Tensor],
        attribute: str | None,
        p: float,
        rule: ClipRule,
        only_finite: bool,
        written: list[Tensor],
    ) -> Any:
        found = _C.cpu_clip_list(items, attribute, p, rule, only_finite, torch.get_num_threads(), written)
        if type(found) is not tuple:
            return found
        norm, is_double = found
        result = _scalar(norm, torch.float64 if is_double else torch.float32)
        return _scalar(norm, torch.float64) if only_finite and norm > _MOST and result.isinf() else result

    def scale_list_(
        self, items: list[Tensor], attribute: str, rule: ClipRule, norm: float, written: list[Tensor]
    ) -> Any:
        return _C.cpu_scale_list(items, attribute, rule, norm, torch.get_num_threads(), written)


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    if dtype is torch.float32 and not _LEAST <= value <= _MOST:
        return _odd_float32(value)
    return torch.scalar_tensor(value, dtype=dtype, device=_HERE)


def _odd_float32(value: float) -> Tensor:
    """What scalar_tensor refuses, or makes a zero of where torch flushes subnormals; rounded to the nearest."""
    if 0 < value < _LEAST:
        bits = round(value * 2.0**149)  # of a subnormal, they count its units
        return torch.scalar_tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32)
    if value > _MOST:
        value = math.inf if value >= 2.0**128 - 2.0**103 else _MOST
    return torch.scalar_tensor(value, dtype=torch.float32, device="cpu")
