"""What torch's fused optimizers take beside the gradients, and a way to hand it to one step alone.

`grad_scale` (fp32, 0-d) divides every gradient, which is then written back; `found_inf` (fp32, 0-d) skips the step if
it is exactly 1. torch's step() reads both from the optimizer, where a GradScaler puts them and takes them off again.
Neither name is documented (seen in torch 2.13). A torch without them would step with gradients that nothing divides,
which the tests of every fused optimizer would see.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_WITH_FUSED_STEP = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}


class StandIn:
    """What one call of an optimizer's step sees as self: `grad_scale` and `found_inf` are its own, all else is the
    optimizer's.

    A pre-hook may exchange the arguments of step(), and self is one of them. So nothing is ever set on the optimizer,
    and nothing can stay behind on it, whether the step returns or raises.
    """

    __slots__ = ("__weakref__", "found_inf", "grad_scale", "optimizer", "param_groups")
    optimizer: Optimizer
    found_inf: Tensor
    grad_scale: Tensor | None
    param_groups: list[dict[str, Any]]  # its own only after `step_nothing`

    def __init__(self, optimizer: Optimizer) -> None:
        object.__setattr__(self, "optimizer", optimizer)

    def step_nothing(self) -> None:
        """Let the step find nothing to do: no parameter, and no state to make."""
        object.__setattr__(self, "param_groups", [])

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


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Whether the step divides by `grad_scale` and skips by `found_inf`. That of a subclass may do anything."""
    return type(optimizer) in _WITH_FUSED_STEP and all(group.get("fused") for group in optimizer.param_groups)


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is already under way in this thread: a subclass's step calling its parent's.

    torch runs the hooks around both, and around an outer one that raised none at all, so that the stack alone knows.
    """
    if type(optimizer).__module__.startswith("torch.optim."):
        return False
    # torch's wrapper that runs the hooks has one code for all classes, and calls what it was given `args`
    # (Optimizer.profile_hook_step, seen in torch 2.13; without it an inner step would be clipped once more).
    hooked, depth = type(optimizer).step.__code__, 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is hooked and frame.f_locals.get("args", (None,))[0] is optimizer:
            depth += 1
        frame = frame.f_back
    return depth > 1
