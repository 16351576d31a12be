"""What torch's fused optimizers take beside the gradients, and a way to hand it to one step alone.

`grad_scale` (fp32, 0-d) divides every gradient, which is then written back; `found_inf` (fp32, 0-d) skips the step if
it is exactly 1. torch's step() reads both from the optimizer, where a GradScaler puts them and takes them off again.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_FUSED = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}  # with fused=True


class Stepping:
    """Stands in for an optimizer during one call of its step: `grad_scale` and `found_inf` are its own, all else is
    the optimizer's.

    A pre-hook may exchange the arguments of step(), and self is one of them. So nothing is ever set on the optimizer,
    and nothing can stay behind on it, whether the step returns or raises.
    """

    __slots__ = ("__weakref__", "found_inf", "grad_scale", "optimizer")
    optimizer: Optimizer
    found_inf: Tensor
    grad_scale: Tensor | None

    def __init__(self, optimizer: Optimizer) -> None:
        object.__setattr__(self, "optimizer", optimizer)

    @property  # isinstance() and super() ask for it
    def __class__(self) -> type:
        return type(self.optimizer)

    @__class__.setter
    def __class__(self, value: type) -> None:
        self.optimizer.__class__ = value

    def __getattr__(self, name: str) -> Any:  # also for an own attribute that has not been set
        if name == "optimizer":
            raise AttributeError("a stand-in that is being copied has no optimizer yet")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("found_inf", "grad_scale"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.optimizer, name)


def divides(optimizer: Optimizer) -> bool:
    """Whether the step divides by `grad_scale` and skips by `found_inf`. That of a subclass may do anything."""
    return type(optimizer) in _FUSED and all(group.get("fused") for group in optimizer.param_groups)


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is already under way in this thread: a subclass's step calling its parent's.

    torch runs the hooks around both, and around an outer one that raised none at all, so that the stack alone knows.
    """
    if type(optimizer).__module__.startswith("torch.optim."):
        return False
    hooked, depth = type(optimizer).step.__code__, 0  # torch's wrapper that runs the hooks: one code for all classes
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is hooked and frame.f_locals.get("args", (None,))[0] is optimizer:
            depth += 1
        frame = frame.f_back
    return depth > 1


def any_of(flags: list[Tensor]) -> Tensor:
    """1 if any flag is not 0. torch's kernels skip at exactly 1, and a GradScaler adds up the flags of its devices."""
    found, *others = flags
    for other in others:
        found = torch.maximum(found, other.to(found.device, non_blocking=True))
    return found.clamp(max=1) if others else found


def refuse_dampening(optimizer: torch.optim.SGD) -> None:
    if any(group["momentum"] and group["dampening"] for group in optimizer.param_groups):
        raise ValueError(
            "on_nonfinite='skip' with an SGD that has momentum and dampening: a skipped first step leaves its momentum "
            "buffers uninitialised in torch, and zeros in their place would dampen the first gradient; set dampening=0"
        )


def make_momentum(optimizer: torch.optim.SGD) -> None:
    """Zeros where torch's fused SGD would leave uninitialised memory if it skips its first step. Without dampening the
    first real step makes the same of them as of no buffer."""
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
