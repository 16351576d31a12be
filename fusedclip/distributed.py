"""The one file that knows torch.distributed: the lifted values of several ranks to that of all."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


def merge_ranks(lifted: Tensor, p: float, group: ProcessGroup) -> Tensor:
    """Lifted values (fp64, any shape) over all ranks of `group`, the same on each of them.

    One all-reduce, of one or two fp64 numbers for each. Every rank must call it, those without a gradient included.
    """
    values = lifted if math.isfinite(p) else _extreme(lifted, p)
    values = values.to(_device_for(lifted.device, group), copy=True)
    all_reduce(values, ReduceOp.SUM if math.isfinite(p) else ReduceOp.MAX, group)
    values = values.to(lifted.device)
    return values if math.isfinite(p) else torch.where(values[1] > 0, math.nan, values[0] * math.copysign(1, p))


def _extreme(lifted: Tensor, p: float) -> Tensor:
    """(value to take the maximum of, whether there is a NaN).

    gloo's and NCCL's MAX lose NaN, hence the second; a minimum is the negated maximum of the negated values.
    """
    value = torch.where(lifted.isnan(), -math.inf, lifted * math.copysign(1, p))
    return torch.stack([value, lifted.isnan().to(value.dtype)])


def _device_for(device: torch.device, group: ProcessGroup) -> torch.device:
    """`device`, or one that the group's backend can communicate from (a rank without gradients starts on the CPU)."""
    kinds = [d.type for d in group._device_types]
    return device if device.type in kinds or not kinds else torch.device(kinds[0])
