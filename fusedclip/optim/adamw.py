"""AdamW that clips inside its update pass."""

from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor

from ..arguments import Limit
from ..peers import Group
from ..updates import AdamWRule
from .base import ClippingOptimizer, Params, learning_rate, number_at_least_0
from .limits import limits_of
from .states import keeping_of


class AdamW(ClippingOptimizer):
    """torch.optim.AdamW with the clip in its kernels, and, if wanted, moments in bf16 and fp32 masters.

    Equivalent to::

        clip_grad_norm_(all parameters, max_norm, norm_type)
        torch.optim.AdamW(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize).step()

    but that no gradient is written: one pass reads them for the norm, another moves parameters and states. On the CPU,
    on a device, over ranks; `.grad` holds what backward() left in it.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW. lr may be a tensor of one
            element, on any device.
        max_norm: as in `fusedclip.clip_grad_norm_`; None takes no norm. It is not part of the state_dict. A param group
            with an entry "max_norm" is clipped by itself to that, all others together to this; None counts as absent,
            and inf only measures. The entry is read at each step.
        norm_type: as in `fusedclip.clip_grad_norm_`.
        on_nonfinite: with a NaN or an inf in any gradient, "propagate" steps with a coefficient of NaN or 0 as
            torch's clip has it; "skip" leaves parameters and states as they are, decided on the device.
        group: as in `fusedclip.clip_grad_norm_`: process groups whose ranks hold other gradients of the same model.
        moments: the dtype that `exp_avg` and `exp_avg_sq` are stored in; arithmetic is fp32. None: the parameter's
            dtype as in torch, fp32 for one with a master. In bf16 (8 bits) a second moment falls only if 1 - beta2 is
            more than 2^-9: take a beta2 of 0.99 or less.
        master: for bf16 and fp16 parameters, what is moved instead of them: "fp32" keeps an fp32 copy, "split" (bf16
            only) the 16 bits that the parameter lacks of it. Both are the same numbers, to the bit; the parameter is
            its master rounded to the nearest, halves away from zero in bf16. With "fp32" the next step undoes what
            somebody else has written to a parameter, unless its master is dropped: `state[parameter].pop("master")`.

    Parameters may be DTensors (FSDP2, tensor parallelism): each rank moves its shards, states are DTensors that
    torch.distributed.checkpoint saves and loads. A torch GradScaler leaves unscaling and skipping to the step, without
    a wait; norm and limit are those of unscaled gradients.

    `state_dict()` loads into torch.optim.AdamW and the other way round (`load_state_dict`, `torch_state_dict`).

    Raises:
        ValueError, TypeError: here for options that are none; from `step()` for sparse, complex and non-floating
            parameters or gradients, and for two parameters that share memory. Nothing has been written then.

    A step is deterministic, whatever the number of threads. It waits for no device.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            # torch's, for its own use after loading; base.py has those of all optimizers
            "capturable": False,
            "decoupled_weight_decay": True,
        }
        super().__init__(
            params, defaults, limits_of(max_norm, norm_type, on_nonfinite, group), keeping_of(moments, master)
        )

    def _rule(self, group: dict[str, Any]) -> AdamWRule:
        beta1, beta2 = map(float, group["betas"])
        for i, beta in enumerate((beta1, beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; it must be at least 0 and less than 1")
        return AdamWRule(
            learning_rate(group),
            beta1,
            beta2,
            number_at_least_0(group["eps"], "eps"),
            number_at_least_0(group["weight_decay"], "weight_decay"),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
        )
