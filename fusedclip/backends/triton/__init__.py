"""The Triton engine: GPUs without a compiled engine, ROCm and XPU; and a second implementation that checks the first.

With TRITON_INTERPRET=1 set before Triton is imported, it serves the CPU's gradients instead, for tests: slowly, and
only when it is asked for by name.
"""

import importlib
import importlib.util
import os
from collections.abc import Set
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor

from ...dtypes import unknown
from ...gradients import Batch
from ...norms import Clipped, ClipRule, counts_tensors
from ..base import Backend, Written
from .updater import TritonUpdater

OLDEST = (3, 6)  # that the kernels are compiled with in the tests
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


class Triton(Backend):
    name = "triton"
    updater = TritonUpdater()

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        installed = _installed_version()
        if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
            return f"Triton {installed} is installed, and {OLDEST[0]}.{OLDEST[1]} or later is needed"
        if not (_interpreter_is_asked_for() or torch.cuda.is_available() or torch.xpu.is_available()):
            return "there is no GPU, and TRITON_INTERPRET=1 is not set"
        return None

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        if _interpreter_is_asked_for():
            if device.type != "cpu":
                return f"TRITON_INTERPRET=1 is set, and the interpreter reads the CPU's memory, not that of {device}"
            if not _is_interpreted():
                return "TRITON_INTERPRET=1 was set after Triton had been imported; set it before Python starts"
        elif device.type not in DEVICES:
            return f"it serves GPUs, not {device.type}"
        return unknown(dtypes)

    def volunteers(self, device: torch.device) -> bool:
        return device.type != "cpu"

    def lift(self, batch: Batch, p: float) -> Tensor:
        return _launch().lift(batch, p)  # type: ignore[no-any-return]

    def stats(self, batch: Batch) -> Tensor:
        return _launch().stats(batch)  # type: ignore[no-any-return]

    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> Written:
        _launch().scale_(batch, coef, zero=zero)
        return _written(coef)

    def clamp_(self, batch: Batch, bound: float) -> Written:
        _launch().clamp_(batch, bound)
        return True

    def fuses(self, p: float) -> bool:
        return not counts_tensors(p)  # each one's value is needed

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        return _launch().norm(batch, p, dtype)  # type: ignore[no-any-return]

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
        clipped: Clipped = _launch().clip_(batch, p, rule, dtype, multiplier, lifted)
        return clipped, _written(clipped.coef)


def _written(coef: Tensor) -> Written:
    """Only a GPU knows whether it wrote. Not asked, it makes autograd see a write too many, which is harmless."""
    return True if coef.device.type != "cpu" else (coef != 1).tolist()


@cache
def _launch() -> ModuleType:
    """Imports Triton, which takes half a second, when the engine is first used."""
    from . import launch

    return launch


@cache
def _installed_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:  # builds for ROCm and XPU are distributed under other names
        return str(importlib.import_module("triton").__version__)


def _interpreter_is_asked_for() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _is_interpreted() -> bool:
    from triton import language

    from . import kernels

    return type(kernels.read_kernel).__name__ == type(language.sum).__name__ == "InterpretedFunction"
