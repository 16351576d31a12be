"""What an engine is: three passes over the gradients of one device."""

from abc import ABC, abstractmethod
from collections.abc import Set

import torch
from torch import Tensor

from .. import norms
from ..grads import Batch
from ..norms import Clipped, ClipRule


class Backend(ABC):
    """An engine. All tensors that it takes and gives live on the batch's device; it never makes the host wait for one.

    To write an engine, implement the abstract methods. `norm` and `clip_` below are made of them; an engine that can
    do either in fewer passes or launches overrides it, and `clip_list_` if the host's time is what counts.
    """

    name: str

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
    def scale_(self, batch: Batch, coef: Tensor, *, zero: bool) -> None:
        """Write pass: each tensor times `coef` (fp64, 0-d, or [T] for one each), which writes nothing where it is 1.

        `zero`: where the coefficient is 0, stores zeros, so that inf and NaN do not survive as NaN.
        """

    @abstractmethod
    def clamp_(self, batch: Batch, bound: float) -> None:
        """Every element into [-bound, bound] in one pass; NaN stays NaN."""

    def norm(self, batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
        """The norm of the whole batch, 0-d, rounded to `dtype` at the very end."""
        return norms.finish(norms.combine(self.lift(batch, p), p), p).to(dtype)

    def clip_(
        self, batch: Batch, p: float, rule: ClipRule, dtype: torch.dtype, *, multiplier: Tensor | None = None
    ) -> Clipped:
        """Read pass, coefficient (fp64, from the unrounded norm), write pass. The norm is returned in `dtype`.

        `multiplier` (0-d, positive, on the batch's device) clips the gradients times that number, as unscaling needs:
        the norm is that of the multiplied gradients, and the multiplier is part of the coefficient.
        """
        norm, coef = norms.clipped(self.norm(batch, p, torch.float64), p, rule, multiplier)
        self.scale_(batch, coef, zero=rule.zero_nonfinite)
        return Clipped(norm.to(dtype), coef)

    def clip_list_(
        self, items: list[Tensor], attribute: str | None, p: float, max_norm: float, zero_nonfinite: bool
    ) -> Tensor | None:
        """A whole call at once: the gradients of `items` (the items themselves if `attribute` is None) are found,
        measured and clipped. The norm is returned in the dtype of results. Without a limit (inf) nothing is written.

        None, with nothing written, for whatever the engine leaves to the road through `gather`.
        """
        return None
