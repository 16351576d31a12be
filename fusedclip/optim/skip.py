"""Skipping a step by `found_inf`, without harm to the momentum that torch's fused SGD has not made yet.

At its first step that optimizer makes its momentum buffers of uninitialised memory, and a skipped step leaves them so:
the next one goes on from whatever was there. What that step should find depends on dampening:

    first step:   buffer = gradient            every other:   buffer = momentum * buffer + (1 - dampening) * gradient

Without dampening a buffer of zeros makes the first step of any other. With dampening nothing does but a step that does
not happen, and only a host that knows the flag can see to that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..transfers import follow
from .stand_in import StandIn


def combine_flags(flags: list[Tensor]) -> Tensor | None:
    """1 if any flag is not 0, None if there is none. torch's kernels skip at exactly 1, and a GradScaler adds up the
    flags of its devices."""
    if not flags:
        return None
    found, *others = flags
    for other in others:
        found = torch.maximum(found, follow(other, found.device))
    return found.clamp(max=1) if others else found


def prepare_momentum(optimizer: torch.optim.SGD, stand_in: StandIn | None) -> None:
    """Before a step that may be skipped: let it leave what it would leave without fused=True.

    Waits for the device where dampening makes that necessary.
    """
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for parameter in _without_momentum(optimizer, group):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)  # type: ignore[arg-type]
    if stand_in is not None and _leaves_garbage(optimizer, stand_in.found_inf):
        stand_in.step_nothing()


def refuse_unmade_momentum(optimizer: Optimizer) -> None:
    """Raise before a step that `prepare_momentum` cannot keep from leaving uninitialised momentum, for want of a
    stand-in."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(optimizer, torch.optim.SGD) or not isinstance(found_inf, Tensor):
        return
    if _leaves_garbage(optimizer, found_inf):
        raise RuntimeError(
            f"the GradScaler skips the first step of this {type(optimizer).__name__} with fused=True, momentum and "
            "dampening, which would leave its momentum uninitialised; set dampening=0 or fused=False, or use "
            "torch.optim.SGD itself (no subclass), not compiled"
        )


def _leaves_garbage(optimizer: torch.optim.SGD, found_inf: Tensor) -> bool:
    """Whether the step is skipped and makes momentum in which zeros would not do. Waits if there is any to be made."""
    dampened = [group for group in optimizer.param_groups if group["momentum"] and group["dampening"]]
    return any(_without_momentum(optimizer, group) for group in dampened) and found_inf.item() == 1


def _without_momentum(optimizer: torch.optim.SGD, group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group whose momentum the step will make."""
    with_gradients = [parameter for parameter in group["params"] if parameter.grad is not None]
    return [p for p in with_gradients if optimizer.state.get(p, {}).get("momentum_buffer") is None]
