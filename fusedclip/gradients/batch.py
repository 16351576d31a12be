"""Tensors of one device that an engine takes in one pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..dtypes import of_bits


@dataclass(slots=True, eq=False)
class Batch:
    """Real, floating and dense tensors of one device."""

    tensors: list[Tensor]
    device: torch.device
    _table: Any = None

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """That its tensors have."""
        if self._table is not None:
            return of_bits(self._table.dtypes)
        return frozenset(tensor.dtype for tensor in self.tensors)

    @property
    def writes(self) -> int:
        """How often a compiled engine has written it."""
        return 0 if self._table is None else int(self._table.writes)

    @property
    def table(self) -> Any:
        """The same as segments, for the compiled engines."""
        if self._table is None:
            gathered = _extension.C.gather(self.tensors, None, None)
            (self._table,) = gathered.lists
            if gathered.survey is not None or len(self._table) != len(self.tensors):
                raise RuntimeError(f"the extension cannot read one of these gradients: {self.tensors}")
        return self._table
