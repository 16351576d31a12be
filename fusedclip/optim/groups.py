"""Param groups as scopes: those with a "max_norm" are clipped by themselves, all others together."""

from typing import Any

import torch
from torch import Tensor

from .. import passes
from ..arguments import check_max_norm
from ..gradients import Gradients
from ..norms import Clipped, ClipRule, Rule
from ..scopes import Scope, measure_scopes, scope_result
from ..transfers import follow

TOGETHER = -1  # the scope of all groups without a limit of their own


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


def measure_groups(
    grads: Gradients, p: float, scopes: dict[int, Scope], multiplier: Tensor | None
) -> dict[int, Clipped]:
    """What each scope is clipped by, norms in fp64; nothing is written."""
    if len(scopes) == 1:  # of everything
        ((number, scope),) = scopes.items()
        return {number: passes.measure(grads, p, scope.rule, multiplier=multiplier)}
    clipped = measure_scopes(grads, p, [*scopes.values()], multiplier=multiplier)
    return dict(zip(scopes, clipped, strict=True))


def found_inf_in(clipped: dict[int, Clipped], grads: Gradients, p: float) -> Tensor:
    """Whether any of the gradients is NaN or inf; see `passes.found_inf`."""
    return passes.found_inf(grads, p, torch.stack([own.norm for own in clipped.values()]))


Results = tuple[Tensor | None, Tensor | None, dict[int, Tensor]]  # total_norm, clip_coef, group_norms


def results_of(
    clipped: dict[int, Clipped], grads: Gradients, scopes: dict[int, Scope], scale: Tensor | None
) -> Results:
    """In the dtypes of results. With a loss scale: of gradients that are still as large by that."""
    norms = {number: scope_result(own.norm, grads, scopes[number]) for number, own in clipped.items()}
    whole, norm = clipped.get(TOGETHER), norms.pop(TOGETHER, None)
    if whole is None or norm is None:
        return None, None, norms
    coef = whole.coef if scale is None else whole.coef * follow(scale, whole.coef.device)
    return norm, coef.to(norm.dtype, copy=True), norms


class LastStep:
    """What the last step did. Nothing of it waits for the device."""

    total_norm: Tensor | None = None
    """The norm before clipping at the last step, of all param groups without a "max_norm" of their own: 0-d, fp32 (fp64
    if any gradient is), on the first gradient's device. None before the first step, or if there is no limit for it."""

    clip_coef: Tensor | None = None
    """What the clip multiplied these gradients by, in the same dtype and place: 1 where nothing was clipped. One for
    each gradient, if the rule is such."""

    group_norms: dict[int, Tensor]
    """By index, the norm of each param group that has a "max_norm" of its own."""
