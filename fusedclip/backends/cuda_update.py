"""The CUDA engine's updates: `csrc/cuda/update.cu`, on torch's current stream. Never waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _extension
from ..updates import UpdateRule
from .base import on
from .updater import Streams, Updater, compile_table

_C = _extension.C


class CudaUpdater(Updater):
    def misfits(self, streams: Streams) -> list[int]:
        return compile_table(streams)

    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        size = _C.cuda_update_scratch_doubles * len(streams.parameters)
        with on(streams.device):
            scratch = torch.empty(size, dtype=torch.float64, device=streams.device)
            _C.cuda_update(streams.table, kind=rules[0].kind, rules=rules, coefs=coefs, skip=skip, scratch=scratch)
