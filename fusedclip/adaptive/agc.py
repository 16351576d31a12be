"""AGC: each unit's gradient is held to a fraction of that unit's weights."""

from collections.abc import Iterable
from typing import SupportsFloat

import torch
from torch import Tensor

from .. import norms, passes, reading
from ..arguments import Tensors, check_norm_type, explain_no_gradients, parameter_list, shown
from ..gradients import gather
from ..torch_internals import is_dtensor, outside_graphs, refuse_tracing
from .options import number

_LEAST = 1e-6  # timm's, below which a norm does not divide


@outside_graphs
def adaptive_clip_grad_(
    parameters: Tensors,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: SupportsFloat | str = 2.0,
    *,
    exclude: Iterable[Tensor] = (),
) -> Tensor:
    """Scale each unit's gradient so that its norm is at most `clip_factor` times that of the unit's weights, in place.

    Equivalent, a unit being an output row (a slice of dimension 0), or all of a tensor of one dimension or none::

        limit = clip_factor * max(norm(weight), eps)
        if norm(grad) >= limit:  grad *= limit / max(norm(grad), 1e-6)

    Args:
        parameters: tensors whose gradients are clipped; those without one are skipped. Both are read once, by the
            engines, as lists of rows; making these takes some 2 us for each row on the host. DTensors: sharded along
            dimension 0, where every rank has whole rows; those of one dimension are one unit, and have to be whole.
        clip_factor: lambda of the paper, which takes 0.01 to 0.16, less for larger batches.
        eps: at least so large a norm of weights is assumed, so that what is zero can begin to move.
        norm_type: as in `fusedclip.clip_grad_norm_`.
        exclude: parameters to leave alone, such as `model.head.parameters()`; the paper does so with the last linear
            layer.

    Returns:
        The norm of these gradients together before clipping: 0-d, fp32 (fp64 if any gradient is), on the first
        gradient's device; of this rank's rows. Does not wait for the device.

    Raises:
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.

    Source: Brock, De, Smith and Simonyan 2021, "High-performance large-scale image recognition without normalization",
    arXiv:2102.06171, equation 3; units and constants are timm's.
    """
    refuse_tracing()
    p, factor, floor = check_norm_type(norm_type), number(clip_factor, "clip_factor"), number(eps, "eps")
    listed = [] if isinstance(exclude, Tensor) else list(exclude)
    if isinstance(exclude, Tensor) or not all(isinstance(one, Tensor) for one in listed):
        raise TypeError(f"exclude must be parameters, such as a list of them, got {shown(exclude)}")
    items, left_out = parameter_list(parameters, "grad"), {id(one) for one in listed}
    gather(items, "grad", p=p)  # which says what cannot be clipped, by the parameter's number
    with_gradient = [item for item in items if item.grad is not None and id(item) not in left_out]
    if not with_gradient:
        explain_no_gradients(items, "grad")
    distinct = list({id(item): item for item in with_gradient}.values())
    pairs = [_units(item, number) for number, item in enumerate(distinct)]
    weights = [row for rows, _ in pairs for row in rows]
    grads = gather([row for _, rows in pairs for row in rows], None, p=p)
    lifted = reading.lift_each(grads, p)
    each = norms.finish(lifted, p)
    limit = factor * norms.finish(reading.lift_each(gather(weights, None, p=p), p), p).clamp(min=floor)
    passes.scale_(grads, torch.where(each < limit, 1.0, limit / each.clamp(min=_LEAST)), checked=True)
    return reading.as_result(norms.finish(norms.whole(lifted, p), p), grads)


def _units(parameter: Tensor, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of a parameter and of its gradient."""
    weight, grad = parameter.detach(), parameter.grad
    assert grad is not None
    if is_dtensor(weight) or is_dtensor(grad):
        weight, grad = _whole_rows(weight, number), _whole_rows(grad, number)
    if grad.layout != torch.strided:
        raise TypeError(
            f"the gradient of parameter {number} is {grad.layout}; AGC wants dense ones. Leave it out with exclude="
        )
    if weight.dim() < 2:
        return [weight], [grad]
    return list(weight.unbind()), list(grad.detach().unbind())


def _whole_rows(tensor: Tensor, number: int) -> Tensor:
    placements = getattr(tensor, "placements", ())
    if not all(one.is_replicate() or (one.is_shard(0) and tensor.dim() > 1) for one in placements):
        raise ValueError(
            f"parameter {number} is placed as {placements}, and AGC wants whole rows on each rank; shard it along "
            "dimension 0, or leave it out with exclude="
        )
    return tensor.to_local()  # type: ignore[attr-defined, no-any-return]
