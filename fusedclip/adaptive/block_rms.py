"""Each tensor's root mean square is held to a threshold: optax's clip_by_block_rms."""

import math

import torch
from torch import Tensor

from .. import passes, reading
from ..arguments import Tensors, parameter_list
from ..gradients import gather_given
from ..torch_internals import outside_graphs, refuse_tracing
from ..transfers import index_on, sent
from .options import number


@outside_graphs
def clip_by_block_rms_(parameters: Tensors, threshold: float, *, grad_attr: str = "grad") -> Tensor:
    """Divide each gradient by max(1, rms / threshold), its rms being sqrt(mean(abs(grad) ** 2)), in place.

    Args:
        parameters, grad_attr: as in `fusedclip.clip_grad_norm_`.
        threshold: above 0, in the unit of the gradients.

    Returns:
        [T], the root mean squares before clipping, one per parameter in the order given (0 for one without a gradient),
        fp32 (fp64 if any gradient is), on the first gradient's device. Does not wait for the device.

    Raises:
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.

    Source: `optax.clip_by_block_rms`; Shazeer and Stern 2018, "Adafactor", arXiv:1804.04235, section 6, does so with
    updates.
    """
    refuse_tracing()
    largest = number(threshold, "threshold", above=True)
    items = parameter_list(parameters, grad_attr)
    grads = gather_given(items, grad_attr)
    each, by_entry = reading.norm_of_each(grads, 2.0)
    counts = [max(item.numel(), 1) for item in items]
    roots = sent(torch.tensor([*map(math.sqrt, counts)], dtype=torch.float64, device="cpu"), each.device)
    by_entry = by_entry / roots
    own = roots if grads.packed_sources is None else roots[index_on(reading.first_entries(grads), each.device)]
    passes.scale_(grads, 1 / (each / own / largest).clamp(min=1.0))
    return reading.as_result(by_entry, grads)
