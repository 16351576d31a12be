"""What clips the gradients of an optimizer of our own: norms are measured, coefficients are left to its kernels."""

from dataclasses import dataclass
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from ..arguments import Limit, check_max_norm, check_norm_type, on_nonfinite_is
from ..gradients import gather
from ..norms import ClipRule
from ..peers import Group, Peers, check_group
from ..transfers import follow
from .groups import TOGETHER, Results, found_inf_in, measure_groups, results_of, scopes_of
from .skip import combine_flags


@dataclass(frozen=True)
class Limits:
    """What the constructor was told."""

    rule: ClipRule | None  # of what is clipped together; None: that is not even measured
    p: float
    skip: bool
    peers: Peers | None


def limits_of(max_norm: Limit | None, norm_type: SupportsFloat, on_nonfinite: str, group: Group | None) -> Limits:
    """The constructor's arguments, checked."""
    skip = on_nonfinite_is("skip", on_nonfinite)
    rule = None if max_norm is None else ClipRule(check_max_norm(max_norm))
    if skip and rule is None:
        raise ValueError("on_nonfinite='skip' asks the norm, and max_norm=None takes none; max_norm=inf measures only")
    return Limits(rule, check_norm_type(norm_type), skip, check_group(group))


@dataclass
class Measured:
    """What one step is to do with its gradients, and to tell of them."""

    coefs: Tensor  # of each param group, fp64: the clip and the inverse of a loss scale
    skip: Tensor | None  # fp32, 0-d
    results: Results


def measure(
    groups: list[dict[str, Any]], device: torch.device, limits: Limits, scale: Tensor | None, found_inf: object
) -> Measured:
    """Norms and coefficients of the groups' gradients, which nobody waits for. `scale`, `found_inf`: a GradScaler's."""
    flags = [found_inf] if isinstance(found_inf, Tensor) else []
    inverse = None if scale is None else scale.double().reciprocal()
    coefs = torch.ones(len(groups), dtype=torch.float64, device=device)
    if inverse is not None:
        coefs *= follow(inverse, device)
    parameters, scopes = scopes_of(groups, limits.rule)
    results: Results = (None, None, {})
    if scopes:
        grads = gather(parameters, p=limits.p, peers=limits.peers)
        clipped = measure_groups(grads, limits.p, scopes, inverse)
        if limits.skip:
            flags.append(found_inf_in(clipped, grads, limits.p))
        results = results_of(clipped, grads, scopes, scale)
        for number, own in clipped.items():  # all groups together come first
            coefs[slice(None) if number == TOGETHER else number] = follow(own.coef, device)
    skip = combine_flags(flags)
    return Measured(coefs, None if skip is None else skip.float(), results)
