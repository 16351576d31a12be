"""What clips the gradients of an optimizer of our own: norms are measured, coefficients are left to its kernels."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import passes
from ..arguments import check_max_norm
from ..gradients import gather
from ..norms import Clipped, ClipRule, Rule, follow
from ..peers import Peers
from ..scopes import Scope, measure_scopes, scope_result
from .skip import combine_flags

TOGETHER = -1  # the scope of all groups without a limit of their own


@dataclass(frozen=True)
class Limits:
    """What the constructor was told."""

    rule: ClipRule | None  # of what is clipped together; None: that is not even measured
    p: float
    skip: bool
    peers: Peers | None


@dataclass
class Measured:
    """What one step is to do with its gradients."""

    coefs: Tensor  # of each param group, fp64: the clip and the inverse of a loss scale
    skip: Tensor | None  # fp32, 0-d
    total_norm: Tensor | None = None
    clip_coef: Tensor | None = None
    group_norms: dict[int, Tensor] = field(default_factory=dict)


def measure(
    groups: list[dict[str, Any]], device: torch.device, limits: Limits, scale: Tensor | None, found_inf: object
) -> Measured:
    """Norms and coefficients of the groups' gradients, which nobody waits for. `scale`, `found_inf`: a GradScaler's."""
    flags = [found_inf] if isinstance(found_inf, Tensor) else []
    inverse = None if scale is None else scale.double().reciprocal()
    coefs = torch.ones(len(groups), dtype=torch.float64, device=device)
    if inverse is not None:
        coefs *= follow(inverse, device)
    measured = Measured(coefs, None)
    parameters, scopes = scopes_of(groups, limits.rule)
    if scopes:
        grads = gather(parameters, p=limits.p, peers=limits.peers)
        if len(scopes) == 1 and len(next(iter(scopes.values())).entries) == len(parameters):
            (scope,) = scopes.values()
            clipped = [passes.measure(grads, limits.p, scope.rule, multiplier=inverse)]
        else:
            clipped = measure_scopes(grads, limits.p, [*scopes.values()], multiplier=inverse)
        if limits.skip:
            flags.append(passes.found_inf(grads, limits.p, torch.stack([c.norm for c in clipped])))
        norms = [scope_result(c.norm, grads, scope) for c, scope in zip(clipped, scopes.values(), strict=True)]
        _note(measured, dict(zip(scopes, clipped, strict=True)), dict(zip(scopes, norms, strict=True)), scale)
    measured.skip = combine_flags(flags).float() if flags else None
    return measured


def scopes_of(groups: list[dict[str, Any]], rule: Rule | None) -> tuple[list[Tensor], dict[int, Scope]]:
    """The parameters that are measured, and the scopes of them: of all groups without a "max_norm" of their own (the
    first, if there is a rule for it), and by index of each that has one."""
    parameters: list[Tensor] = []
    together: list[int] = []
    scopes: dict[int, Scope] = {} if rule is None else {TOGETHER: Scope(together, rule)}
    for i, group in enumerate(groups):
        own = group.get("max_norm")
        if own is None and rule is None:
            continue
        entries = range(len(parameters), len(parameters) + len(group["params"]))
        parameters += group["params"]
        if own is None:
            together.extend(entries)
        else:
            scopes[i] = Scope(entries, ClipRule(check_max_norm(own, f'optimizer.param_groups[{i}]["max_norm"]')))
    return parameters, scopes


def _note(measured: Measured, clipped: dict[int, Clipped], norms: dict[int, Tensor], scale: Tensor | None) -> None:
    whole = clipped.get(TOGETHER)
    measured.total_norm = norms.pop(TOGETHER, None)
    measured.group_norms = norms
    coefs = measured.coefs
    if whole is not None:
        coefs[:] = follow(whole.coef, coefs.device)
        coef = whole.coef if scale is None else whole.coef * follow(scale, whole.coef.device)
        assert measured.total_norm is not None
        measured.clip_coef = coef.to(measured.total_norm.dtype, copy=True)
    for i, own in clipped.items():
        if i != TOGETHER:
            coefs[i] = follow(own.coef, coefs.device)
