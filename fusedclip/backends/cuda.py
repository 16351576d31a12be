"""The CUDA engine: `csrc/cuda`, on torch's current stream and from torch's memory. Never waits for the device."""

import math
import re
from collections.abc import Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from .. import _extension
from ..dtypes import unknown
from ..gradients import Batch
from ..norms import STATS, Clipped, ClipRule, counts_tensors
from ..transfers import follow
from ..updates import UpdateRule
from .base import Backend, Written, on
from .updater import CompiledUpdater, Streams

_C = _extension.C
_FORMS = ("auto", "two launches", "on chip")  # cuda::Form

form: Literal["auto", "two launches", "on chip"] = "auto"
"""How a list is clipped; set `fusedclip.backends.cuda.form` to choose, for the whole process.

"two launches" reads the gradients, and reads and writes them again if they are clipped. "on chip" reads them once, into
shared memory, and needs every multiprocessor at the same time: it raises RuntimeError where the gradients do not fit,
and may wait for ever for a kernel that spins on the device until other ranks answer. "auto" keeps on chip what fits
unless torch.distributed is initialized or the device refused; with other communication libraries choose "two launches".
"""


class CudaUpdater(CompiledUpdater):
    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        size = _C.cuda_update_scratch_doubles * len(streams.parameters)
        with on(streams.device):
            scratch = torch.empty(size, dtype=torch.float64, device=streams.device)
            _C.cuda_update(streams.table, kind=rules[0].kind, rules=rules, coefs=coefs, skip=skip, scratch=scratch)


class Cuda(Backend):
    name = "cuda"
    counts_writes = True
    updater = CudaUpdater()

    def missing(self) -> str | None:
        if _C is None:
            return _extension.reason
        if not _C.cuda_architectures:
            return "the extension was built without its CUDA half (no nvcc from 12.1 on was found, or FUSEDCLIP_CUDA=0)"
        return _C.cuda_missing() or None

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        if device.type != "cuda":
            return f"it serves NVIDIA GPUs, not {device.type}"
        if torch.version.hip is not None:
            return "this torch is for ROCm"
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(_C.cuda_architectures, capability):
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the "
                f"extension was built for {_C.cuda_architectures} (FUSEDCLIP_CUDA_ARCHS chooses)"
            )
        return unknown(dtypes)

    def lift(self, batch: Batch, p: float) -> Tensor:
        with on(batch.device):
            out = torch.empty(len(batch.tensors), dtype=torch.float64, device=batch.device)
            _C.cuda_lift(batch.table, p=p, scratch=_scratch(batch), out=out)
        return out

    def stats(self, batch: Batch) -> Tensor:
        with on(batch.device):
            out = torch.empty(STATS, len(batch.tensors), dtype=torch.float64, device=batch.device)
            _C.cuda_stats(batch.table, scratch=_scratch(batch, STATS), out=out)
        return out

    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> Written:
        with on(batch.device):
            _C.cuda_scale(batch.table, coef=coef.contiguous(), per_tensor=coef.dim() == 1, zero=zero)
        return True  # whether the coefficient was 1, only the device knows

    def clamp_(self, batch: Batch, bound: float) -> Written:
        with on(batch.device):
            _C.cuda_clamp(batch.table, bound=bound)
        return True

    def fuses(self, p: float) -> bool:
        return not counts_tensors(p)  # each one's value is needed

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        with on(batch.device):
            norm = torch.empty((), dtype=dtype, device=batch.device)
            _C.cuda_norm(batch.table, p=p, scratch=_scratch(batch), norm=norm)
        return norm

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
        limit = _on_device(rule.max_norm, batch)
        with on(batch.device):
            norm = torch.empty((), dtype=dtype, device=batch.device)
            coef = torch.empty((), dtype=torch.float64, device=batch.device)
            _C.cuda_clip(
                batch.table,
                p=p,
                rule=rule if limit is None else rule._replace(max_norm=math.inf),
                max_norm=limit,
                multiplier=_on_device(multiplier, batch),
                lifted=lifted,
                scratch=None if lifted is not None else _scratch(batch),
                norm=norm,
                coef=coef,
                form=_chosen_form(),
            )
        return Clipped(norm, coef), True


def _chosen_form() -> int:
    if form not in _FORMS:
        raise ValueError(f"fusedclip.backends.cuda.form is {form!r}; there are {', '.join(map(repr, _FORMS))}")
    # A communication kernel that spins on a multiprocessor until a peer answers would hold the on-chip form up, for
    # ever if that peer waits for this rank; ordinary launches pass it by.
    has_peers = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _FORMS.index("two launches" if form == "auto" and has_peers else form)


def _scratch(batch: Batch, rows: int = 1) -> Tensor:
    """Memory for a call's partial results."""
    return torch.empty(_C.cuda_scratch_doubles(batch.table, rows), dtype=torch.float64, device=batch.device)


def _on_device(number: float | Tensor | None, batch: Batch) -> Tensor | None:
    """One fp64 number beside the gradients, if it is a tensor."""
    if not isinstance(number, Tensor):
        return None
    return follow(number, batch.device).double()


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether a device of this compute capability can run what was built for e.g. "80-real 90-real 90-virtual".

    Machine code runs on its own and later minor versions of its major one, PTX on anything later; a name with a letter
    (90a, 100f) makes no such promise.
    """
    device = capability[0] * 10 + capability[1]
    for number, letter, kind in re.findall(r"(\d+)([a-z]?)(-real|-virtual|)", built):
        architecture = int(number)
        same_major = architecture // 10 == capability[0]
        if architecture == device or (not letter and architecture < device and (kind != "-real" or same_major)):
            return True
    return False
