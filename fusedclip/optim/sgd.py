"""SGD that clips inside its update pass."""

from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor

from ..arguments import Limit
from ..peers import Group
from ..updates import SGDRule
from .base import ClippingOptimizer, Params, learning_rate, number_at_least_0
from .limits import limits_of
from .states import keeping_of


class SGD(ClippingOptimizer):
    """torch.optim.SGD with the clip in its kernels; all else is as in `fusedclip.optim.AdamW`.

    Equivalent to::

        clip_grad_norm_(all parameters, max_norm, norm_type)
        torch.optim.SGD(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize).step()

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        max_norm, norm_type, on_nonfinite, group, moments, master: as in `fusedclip.optim.AdamW`; `moments` is the dtype
            of the momentum.

    A step that is skipped leaves no momentum behind, with dampening, too: the first step that is made is the first.
    """

    _own_keys = frozenset({"step"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: Limit | None = None,
        norm_type: SupportsFloat = 2.0,
        on_nonfinite: Literal["propagate", "skip"] = "propagate",
        group: Group | None = None,
        moments: torch.dtype | None = None,
        master: Literal["fp32", "split"] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(
            params, defaults, limits_of(max_norm, norm_type, on_nonfinite, group), keeping_of(moments, master)
        )

    def _rule(self, group: dict[str, Any]) -> SGDRule:
        momentum, dampening = number_at_least_0(group["momentum"], "momentum"), float(group["dampening"])
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov=True needs a momentum, and a dampening of 0")
        return SGDRule(
            learning_rate(group),
            momentum,
            dampening,
            number_at_least_0(group["weight_decay"], "weight_decay"),
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )
