"""apex's and TransformerEngine's multi-tensor kernels, where their compiled modules can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.contenders import Contender, gradients_of
from benchmarks.operations import Operation

MODULES = {"apex": "amp_C", "TransformerEngine": "transformer_engine_torch"}
CHUNK = 65536  # elements per block, both libraries' default
EPS = 1e-6


def peers() -> list[Contender]:
    found = []
    for name, module in MODULES.items():
        try:
            found.append(multi_tensor(name, importlib.import_module(module)))
        except ImportError:
            continue  # not installed: it stays out of the table
    return found


def multi_tensor(name: str, kernels: Any) -> Contender:
    """Norm and scaling as apex.contrib.clip_grad and Megatron-LM compose them, one launch sequence per dtype."""

    def norm_of(gradients: Sequence[Tensor]) -> Tensor:
        flag = torch.zeros(1, dtype=torch.int32, device=gradients[0].device)
        norms: list[Tensor] = [
            kernels.multi_tensor_l2norm(CHUNK, flag, [group], False)[0] for group in by_dtype(gradients)
        ]
        return norms[0][0] if len(norms) == 1 else torch.linalg.vector_norm(torch.cat(norms))

    def norm(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return norm_of(gradients_of(parameters))

    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        gradients = gradients_of(parameters)
        total = norm_of(gradients)
        coefficient = (limit / (total + EPS)).clamp(max=1.0)
        flag = torch.zeros(1, dtype=torch.int32, device=total.device)
        for group in by_dtype(gradients):
            scale(kernels)(CHUNK, flag, [group, group], coefficient)
        return total

    return Contender(name, {Operation.NORM: norm, Operation.NOT_CLIPPED: clip, Operation.CLIPPED: clip})


def scale(kernels: Any) -> Callable[..., Any]:
    """The scaling kernel that takes its factor from the device, or the older one, for which the host has to wait."""
    if hasattr(kernels, "multi_tensor_scale_tensor"):
        return lambda chunk, flag, lists, factor: kernels.multi_tensor_scale_tensor(chunk, flag, lists, factor)
    return lambda chunk, flag, lists, factor: kernels.multi_tensor_scale(chunk, flag, lists, float(factor))


def by_dtype(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Their kernels take the first tensor's dtype for that of all."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.dtype, []).append(gradient)
    return list(groups.values())
