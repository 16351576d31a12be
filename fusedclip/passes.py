"""The read pass and the conditional write pass over a set of gradients: what everything above composes.

lift_each   [U] lifted values, one per gradient          (read pass)
total       0-d, over all of them and all ranks of a group
scale_      gradients times a coefficient                (write pass, skipped where that is 1)
clip_       all of it; a single call of the engine where nothing stands between the two passes
measure     all of it but the write pass
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import norms
from .backends import serving
from .grads import Gradients
from .norms import Clipped, ClipRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def lift_each(grads: Gradients, p: float) -> Tensor:
    """Lifted value of each gradient, fp64, in the order of the batches, on the first gradient's device."""
    if not grads.reads:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    lifted = [serving(batch).lift(batch, p) for batch in grads.reads]
    return lifted[0] if len(lifted) == 1 else torch.cat([part.to(grads.device) for part in lifted])


def total(lifted: Tensor, p: float, group: "ProcessGroup | None") -> Tensor:
    """The lifted value of the whole list, 0-d, over all ranks of `group`."""
    whole = norms.combine(lifted, p) if len(lifted) else lifted.new_full((), norms.identity(p))
    if group is None:
        return whole
    from .distributed import merge_ranks  # not before it is asked for: a build of torch may lack it

    return merge_ranks(whole, p, group)


def norm(grads: Gradients, p: float, *, error_if_nonfinite: bool, group: "ProcessGroup | None") -> Tensor:
    """The norm of all gradients, in the dtype of results. Waits for the device only if `error_if_nonfinite`."""
    if not grads.reads and group is None:
        return _nothing()
    if len(grads.reads) == 1 and group is None and not error_if_nonfinite:
        return serving(grads.reads[0]).norm(grads.reads[0], p, grads.dtype)
    lifted = lift_each(grads, p)
    exact = norms.finish(total(lifted, p, group), p)
    if error_if_nonfinite:
        _raise_if_nonfinite(exact, lifted, grads, p)
    return exact.to(grads.dtype)


def clip_(
    grads: Gradients,
    p: float,
    rule: ClipRule,
    *,
    error_if_nonfinite: bool = False,
    group: "ProcessGroup | None" = None,
    multiplier: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Clipped:
    """Clip to the rule; the norm is in `dtype`, that of results unless given. Nothing has been written if this raises.

    `multiplier` (0-d, on any device): the gradients are multiplied by it as well, in the same write pass; norm and rule
    are those of the product.
    """
    dtype = dtype or grads.dtype
    if group is None and not error_if_nonfinite and len(grads.reads) == 1 and grads.reads is grads.writes:
        batch = grads.reads[0]
        there = None if multiplier is None else multiplier.to(batch.device, non_blocking=True)
        clipped = serving(batch).clip_(batch, p, rule, dtype, multiplier=there)
        grads.write_back(clipped.coef)
        return clipped
    exact, coef = measure(grads, p, rule, error_if_nonfinite=error_if_nonfinite, group=group, multiplier=multiplier)
    scale_(grads, coef, zero=rule.zero_nonfinite)
    return Clipped(exact.to(dtype), coef)


def measure(
    grads: Gradients,
    p: float,
    rule: ClipRule,
    *,
    error_if_nonfinite: bool = False,
    group: "ProcessGroup | None" = None,
    multiplier: Tensor | None = None,
) -> Clipped:
    """What `clip_` does but for the write pass: the coefficient is for someone else to apply. The norm is in fp64."""
    if not grads.reads and group is None:
        return Clipped(_nothing().double(), torch.ones((), dtype=torch.float64, device="cpu"))
    lifted = lift_each(grads, p)
    exact = norms.finish(total(lifted, p, group), p)
    if error_if_nonfinite:
        _raise_if_nonfinite(exact, lifted, grads, p)
    return norms.clipped(exact, p, rule, multiplier)


def found_inf(grads: Gradients, p: float, exact: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Whether any gradient (of any rank of the group) is NaN or inf: 1 or 0, fp32, 0-d, as torch's optimizers want it.

    `exact` is their norm in fp64. That tells, except for the orders and dtypes that need a second read; this may come
    after the write pass, in which NaN and inf stay one or the other.
    """
    # Ranks may hold different dtypes, and have to agree on whether there is another all-reduce.
    if not norms.shows_nonfinite(p, grads.dtype if group is None else torch.float32):
        exact = total(lift_each(grads, math.inf), math.inf, group)
    return exact.isfinite().logical_not().to(torch.float32)


def scale_(grads: Gradients, coef: Tensor, *, zero: bool = False) -> None:
    """Gradients times `coef`: fp64, 0-d, or [U] for one each in the order of the batches."""
    start = 0
    for batch in grads.writes:
        part = coef if coef.dim() == 0 else coef[start : start + len(batch.tensors)]
        start += len(batch.tensors)
        serving(batch).scale_(batch, part.to(batch.device), zero=zero)
    grads.write_back(coef)


def clamp_(grads: Gradients, bound: float) -> None:
    """Every element into [-bound, bound]."""
    for batch in grads.writes:
        serving(batch).clamp_(batch, bound)
    grads.write_back()


def spread(values: Tensor, grads: Gradients) -> Tensor:
    """[U] values in the order of the batches to one per entry of the list, in the dtype of results.

    An entry without a gradient gets 0.
    """
    values = values.to(grads.dtype)
    if grads.sources == list(range(len(values))):
        return values
    padded = torch.cat([values, values.new_zeros(1)])
    return torch.stack([padded[place] for place in grads.sources])  # a list as index would have the host wait


def _nothing() -> Tensor:
    """torch's answer for no gradients at all."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


def _raise_if_nonfinite(norm: Tensor, lifted: Tensor, grads: Gradients, p: float) -> None:
    """Judges the unrounded norm: the same on all ranks, whatever dtype each of them returns it in."""
    if norm.isfinite():
        return
    values = norms.finish(lifted, p).tolist()
    bad = [place for place, value in enumerate(values) if not -float("inf") < value < float("inf")]
    shown = ", ".join(f"{grads.name(place)} ({values[place]})" for place in bad[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    where = f"The culprits are {shown}{more}." if bad else "Every tensor here has a finite norm of its own."
    raise RuntimeError(
        f"The total norm of order {p} for gradients from `parameters` is non-finite ({norm.item()}), so it cannot be "
        f"clipped. {where} No gradient has been changed. To clip anyway, set `error_if_nonfinite=False`; "
        "on_nonfinite='zero' then stores zeros instead of NaN"
    )
