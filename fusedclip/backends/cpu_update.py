"""The CPU engine's updates: `csrc/cpu/update.cpp`, on torch's threads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _extension
from ..updates import UpdateRule
from .updater import Streams, Updater, compile_table

_C = _extension.C


class CpuUpdater(Updater):
    def misfits(self, streams: Streams) -> list[int]:
        return compile_table(streams)

    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        _C.cpu_update(
            streams.table, kind=rules[0].kind, rules=rules, coefs=coefs, skip=skip, threads=torch.get_num_threads()
        )
