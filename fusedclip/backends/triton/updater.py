"""The Triton engine's face for optimizers."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ...dtypes import FLOATING
from ...gradients.layouts import EXACT_TYPES, is_dense
from ...updates import UpdateRule
from ..updater import Streams, Updater


class TritonUpdater(Updater):
    def misfits(self, streams: Streams) -> list[int]:
        odd = [place for place in range(len(streams.parameters)) if not _fits(streams, place)]
        if not odd and _launches().overlap(streams.parameters):
            raise ValueError(
                "two of the parameters share memory, which would be updated twice; give the optimizer one of them "
                "(tied weights are one Parameter in two places)"
            )
        return odd

    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        _launches().update_(streams, rules, coefs, skip)


@cache
def _launches() -> ModuleType:
    """Imports Triton, which takes half a second, when the engine is first used."""
    from . import update

    return update


def _fits(streams: Streams, place: int) -> bool:
    """Whether all its streams are plain tensors of the device, with their elements in one order of memory."""
    parameter, master = streams.parameters[place], streams.masters[place]
    numbers = [parameter, streams.gradients[place], *(state[place] for state in streams.states)]
    beside = numbers if master is None else [*numbers, master]
    return (
        all(type(tensor) in EXACT_TYPES and tensor.layout == torch.strided for tensor in beside)
        and all(tensor.device == streams.device and tensor.shape == parameter.shape for tensor in beside)
        and all(tensor.dtype in FLOATING and not tensor.is_neg() for tensor in numbers)
        and is_dense(parameter)
        and all(tensor.stride() == parameter.stride() or _contiguous(tensor, parameter) for tensor in beside)
        and (streams.steps is None or getattr(streams.steps[place], "device", None) == streams.device)
    )


def _contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)
