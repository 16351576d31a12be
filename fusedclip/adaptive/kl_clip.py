"""KL clipping: a preconditioned step is held to a trust region, as K-FAC does."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..arguments import Tensors, as_list, shown
from ..gradients.layouts import overlaps
from ..torch_internals import is_dtensor, outside_graphs, refuse_tracing
from ..transfers import follow
from .options import number


@outside_graphs
@torch.no_grad()
def kl_clip_(
    parameters: Tensors, preconditioned: Iterable[Tensor | None], max_kl: float, lr: float, *, grad_attr: str = "grad"
) -> Tensor:
    """Scale preconditioned gradients Pg so that the step they make changes the model by `max_kl` at most, in place.

    Equivalent::

        scale = min(1, sqrt(max_kl / (lr ** 2 * abs(sum((g * Pg).sum() for g, Pg in zip(gradients, preconditioned))))))
        for Pg in preconditioned: Pg *= scale

    Args:
        parameters: tensors that hold the gradients g, which are read only.
        preconditioned: as many tensors, which are scaled: the gradient of each parameter times a curvature's inverse,
            of the same shape and device; None for a parameter without a gradient. One listed twice counts once.
        max_kl: above 0; K-FAC takes 1e-3.
        lr: the learning rate of the step.
        grad_attr: as in `fusedclip.clip_grad_norm_`.

    Returns:
        The scale: fp64, 0-d, on the first gradient's device; 1 if there is none. Does not wait for the device.

    The products are torch's own, in fp32 for 16-bit tensors. The absolute value is that of common K-FAC code, for
    preconditioners that are not quite positive.

    Source: Ba, Grosse and Martens 2017, "Distributed second-order optimization using Kronecker-factored
    approximations"; Martens and Grosse 2015, arXiv:1503.05671.
    """
    refuse_tracing()
    bound, rate = number(max_kl, "max_kl", above=True), number(lr, "lr")
    items, steps = as_list(parameters, "parameters"), list(preconditioned)
    pairs = _pairs(items, steps, grad_attr)
    if not pairs:
        return torch.ones((), dtype=torch.float64, device="cpu")
    device = pairs[0][0].device
    dots = torch.stack([follow(_dot(grad, step), device) for grad, step in pairs])
    scale = (bound / (rate**2 * dots.sum().abs())).sqrt().clamp(max=1.0)  # over 0: inf, so 1
    for _, step in pairs:
        step.mul_(follow(scale, step.device))
    return scale


def _pairs(items: list[Tensor], steps: list[Tensor | None], grad_attr: str) -> list[tuple[Tensor, Tensor]]:
    if len(items) != len(steps):
        raise ValueError(f"there are {len(items)} parameters and {len(steps)} preconditioned gradients")
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for number_, (item, step) in enumerate(zip(items, steps, strict=True)):
        grad = getattr(item, grad_attr, None)
        if grad is None and step is None:
            continue
        if not isinstance(grad, Tensor) or not isinstance(step, Tensor) or grad.shape != step.shape:
            raise ValueError(
                f"parameter {number_} has the gradient {shown(grad)}, and preconditioned[{number_}] is {shown(step)}; "
                "both must be tensors of one shape, or both None"
            )
        if is_dtensor(grad) or is_dtensor(step):
            raise TypeError(f"parameter {number_} is a DTensor; kl_clip_ takes whole gradients: pass .full_tensor()")
        if not grad.layout == step.layout == torch.strided:
            raise TypeError(f"parameter {number_} has a sparse gradient or step; kl_clip_ takes dense ones")
        if not step.is_floating_point() and not step.is_complex():
            raise TypeError(f"preconditioned[{number_}] is {step.dtype} and cannot be scaled")
        if overlaps(step):
            raise ValueError(f"preconditioned[{number_}] is expanded and cannot be scaled in place; .clone() it first")
        pairs[id(step)] = grad, step
    return list(pairs.values())


def _dot(one: Tensor, other: Tensor) -> Tensor:
    def wide(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().flatten()
        return tensor.float() if tensor.element_size() < 4 else tensor

    one, other = wide(one), wide(other)
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.vdot(one.to(dtype), other.to(dtype)).real.double()
