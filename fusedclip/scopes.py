"""Several sets of gradients, each with a norm and a limit of its own, in one read pass and one write pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import norms, passes, reading
from .gradients import Gradients, refuse_shared
from .norms import Clipped, Rule


class Scope(NamedTuple):
    """Some entries of a list, and the rule for their norm."""

    entries: Sequence[int]
    rule: Rule
    name: str = ""


def measure_scopes(
    grads: Gradients,
    p: float,
    scopes: list[Scope],
    *,
    error_if_nonfinite: bool = False,
    multiplier: Tensor | None = None,
) -> list[Clipped]:
    """Norm and coefficient of each scope, fp64 and 0-d, on the first gradient's device; nothing is written.

    Over other ranks in one all-reduce for all scopes. Raises ValueError if two scopes share a gradient, or its memory.
    """
    places = _places(grads, scopes)
    refuse_shared(grads, {place: number for number, own in enumerate(places) for place in own}.get)
    lifted = reading.lift_each(grads, p)
    if grads.is_local:
        wholes = torch.stack([norms.whole(norms.select(lifted, own), p) for own in places])
    else:
        label = "".join(f"{scope.name}: " for scope in scopes if scope.name)
        wholes = reading.totals(lifted, p, grads, [scope.entries for scope in scopes], label)
    exact = norms.finish(wholes, p)
    if error_if_nonfinite:
        reading.raise_if_nonfinite(exact, lifted, grads, p)
    return [
        norms.clipped(norm if own or not grads.is_local else torch.zeros_like(norm), p, scope.rule, multiplier)
        for norm, own, scope in zip(exact.unbind(), places, scopes, strict=True)
    ]


def scale_scopes_(grads: Gradients, scopes: list[Scope], coefs: list[Tensor], *, zero: bool = False) -> None:
    """The gradients of each scope times its coefficient (0-d, fp64, on the first gradient's device)."""
    if len(scopes) == 1:
        return passes.scale_(grads, coefs[0], zero=zero)
    if not grads.reads:
        return None
    each = torch.ones(len(grads), dtype=torch.float64, device=grads.device)
    for own, coef in zip(_places(grads, scopes), coefs, strict=True):
        for run in norms.runs(own):
            each[run] = coef
    return passes.scale_(grads, each, zero=zero, checked=True)


def scope_result(norm: Tensor, grads: Gradients, scope: Scope) -> Tensor:
    """A scope's norm in the dtype of results: fp64 if any gradient of its own is."""
    return reading.rounded(norm, grads.dtype_of(scope.entries))


def _places(grads: Gradients, scopes: list[Scope]) -> list[list[int]]:
    """Of each scope, the places of its gradients, ascending."""
    scope_of: dict[int, int] = {}
    for number, scope in enumerate(scopes):
        for entry in scope.entries:
            place = grads.sources[entry]
            if place >= 0 and scope_of.setdefault(place, number) != number:
                raise ValueError(f"{grads.name(place)} belongs to two groups with limits of their own")
    places: list[list[int]] = [[] for _ in scopes]
    for place, number in sorted(scope_of.items()):
        places[number].append(place)
    return places
