"""What an engine is: three passes over the gradients of one device."""

from abc import ABC, abstractmethod
from collections.abc import Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..gradients import Batch
from ..norms import Clipped, ClipRule
from .updater import Updater

# What an engine says that it wrote: all of a batch, nothing, or these of its tensors. One that cannot tell without
# waiting for its device says all.
Written = bool | list[bool]


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device current, as launches want it, unless it is (the guard costs 2 us)."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    guard: AbstractContextManager[object] = module.device(device)
    return nullcontext() if module.current_device() == device.index else guard


class Backend(ABC):
    """An engine. All tensors that it takes and gives live on the batch's device; it never makes the host wait for one.

    To write an engine, implement the abstract methods. One that can do more in fewer passes or launches says so
    (`fuses`, `takes_lists`) and implements what then is asked of it.
    """

    name: str
    takes_lists = False
    counts_writes = False  # in Batch.writes, so that an interrupt cannot hide whether it has written
    updater: Updater | None = None  # its other face, for optimizers

    @abstractmethod
    def missing(self) -> str | None:
        """Why this engine cannot run on this machine at all, or None."""

    @abstractmethod
    def refuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> str | None:
        """Why this engine does not serve these gradients, or None. Asked only of engines that miss nothing."""

    def volunteers(self, device: torch.device) -> bool:
        """Whether it may be chosen for a device without being asked for by name."""
        return True

    @abstractmethod
    def lift(self, batch: Batch, p: float) -> Tensor:
        """Read pass: the lifted value of each tensor, fp64, [T]."""

    @abstractmethod
    def stats(self, batch: Batch) -> Tensor:
        """Read pass: the lifted statistics of each tensor, fp64, [5, T]; norms.py names the rows.

        The squares are summed as by `lift`. NaN and inf spread as they do there, and are counted as well.
        """

    @abstractmethod
    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> Written:
        """Write pass: each tensor times `coef` (fp64, 0-d, or [T] for one each), which writes nothing where it is 1.

        `zero`: where the coefficient is 0, stores zeros, so that inf and NaN do not survive as NaN.
        """

    @abstractmethod
    def clamp_(self, batch: Batch, bound: float) -> Written:
        """Every element into [-bound, bound] in one pass; NaN stays NaN."""

    def fuses(self, p: float) -> bool:
        """Whether it has `norm` and `clip_` for this order: fewer passes or launches than lift and scale_ take."""
        return False

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        """The norm of the whole batch, 0-d, rounded to `dtype` at the very end."""
        raise NotImplementedError

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
        """Read pass, coefficient (fp64, from the unrounded norm), write pass. The norm is returned in `dtype`.

        `multiplier` (0-d, positive, on the batch's device) clips the gradients times that number, as unscaling needs:
        the norm is that of the multiplied gradients, and the multiplier is part of the coefficient.
        `lifted` (fp64, 0-d, there as well) is what came of the read pass, over all ranks: it is not made again.
        """
        raise NotImplementedError

    def clip_list_(
        self,
        items: list[Tensor],
        attribute: str | None,
        p: float,
        rule: ClipRule,
        only_finite: bool,
        written: list[Tensor],
    ) -> Any:
        """A whole call at once, if the engine `takes_lists`: the gradients of `items` (the items themselves if
        `attribute` is None) are found, measured and clipped.

        Returns their norm in the dtype of results, with the tensors that it wrote in `written`; or, with nothing
        written, what the sweep found, for whatever is left to the road through batches. That is so, too, where
        `only_finite` norms are wanted and this one is not; one that is finite is then returned in fp64 where the dtype
        of results cannot hold it.
        """
        raise NotImplementedError

    def scale_list_(
        self, items: list[Tensor], attribute: str, rule: ClipRule, norm: float, written: list[Tensor]
    ) -> Any:
        """The same for a `norm` that is known. Returns None; or, with nothing written, what the sweep found."""
        raise NotImplementedError
