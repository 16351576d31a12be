"""What torch.compile traces in place of the public functions: operators, which no compiler looks into.

Dynamo finds it by a function's `_torchdynamo_inline`, so that an eager call never comes by. What no operator takes
(other ranks, gradients that are not plain and dense, `error_if_nonfinite`, no gradient at all, bad arguments) is one
graph break, and the function itself runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import clip, norms, operators, stats
from .arguments import Limit, Tensors
from .dtypes import FLOATING
from .torch_internals import outside_graphs

Function = Callable[..., Any]
TRACED: dict[Function, Function] = {}
"""By public function, what dynamo traces in its place; that returns NotImplemented for what no operator takes."""


def _in_place_of(function: Function) -> Callable[[Function], Function]:
    """Decorator: this is what dynamo traces of one of our functions, unless it returns NotImplemented."""

    def mark(substitute: Function) -> Function:
        @outside_graphs
        def outside(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        def traced(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                result = substitute(*args, **kwargs)
            return outside(*args, **kwargs) if result is NotImplemented else result

        function._torchdynamo_inline = traced  # type: ignore[attr-defined]
        TRACED[function] = substitute
        return substitute

    return mark


@_in_place_of(clip.get_total_norm)
def _trace_total_norm(
    tensors: Tensors,
    norm_type: object = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: object = None,
) -> Any:
    found, p = _found(tensors, None), _order(norm_type)
    if found is None or p is None or error_if_nonfinite or group is not None:
        return NotImplemented
    return torch.ops.fusedclip.total_norm(found[0], p)


@_in_place_of(clip.get_per_tensor_norms)
def _trace_norms(tensors: Tensors, norm_type: object = 2.0) -> Any:
    found, p = _found(tensors, None), _order(norm_type)
    return NotImplemented if found is None or p is None else torch.ops.fusedclip.norms(*found, p)


@_in_place_of(clip.clip_grad_norm_)
def _trace_clip_norm_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: object = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: object = "propagate",
    group: object = None,
    counted_elsewhere: object = None,
    grad_attr: str = "grad",
) -> Any:
    found, p = _found(parameters, grad_attr), _order(norm_type)
    limit, zero = _limit(max_norm, found), _zero(on_nonfinite)
    plain = not error_if_nonfinite and group is None and counted_elsewhere is None
    if found is None or p is None or limit is None or zero is None or not plain:
        return NotImplemented
    return torch.ops.fusedclip.clip_norm_(found[0], limit, p, zero)


@_in_place_of(clip.clip_grad_norm_per_tensor_)
def _trace_clip_each_(parameters: Tensors, max_norm: Limit, norm_type: object = 2.0, *, grad_attr: str = "grad") -> Any:
    found, p = _found(parameters, grad_attr), _order(norm_type)
    limit = _limit(max_norm, found)
    if found is None or p is None or limit is None:
        return NotImplemented
    return torch.ops.fusedclip.clip_each_(*found, limit, p)


@_in_place_of(clip.clip_grad_norm_scopes_)
def _trace_clip_scopes_(
    scopes: Mapping[str, Tensors],
    max_norm: Limit | Mapping[str, Limit | None],
    norm_type: object = 2.0,
    error_if_nonfinite: bool = False,
    *,
    on_nonfinite: object = "propagate",
    group: object = None,
    counted_elsewhere: object = None,
    grad_attr: str = "grad",
) -> Any:
    p, zero = _order(norm_type), _zero(on_nonfinite)
    plain = not error_if_nonfinite and group is None and counted_elsewhere is None
    if not isinstance(scopes, Mapping) or not scopes or p is None or zero is None or not plain:
        return NotImplemented
    if isinstance(max_norm, Mapping) and set(max_norm) != set(scopes):
        return NotImplemented
    gradients: list[Tensor] = []
    sizes, limits, dtypes = [], [], []
    for name, parameters in scopes.items():
        found = _found(parameters, grad_attr)
        own = max_norm[name] if isinstance(max_norm, Mapping) else max_norm
        limit = _limit(math.inf if own is None else own, found)
        if found is None or limit is None:
            return NotImplemented
        gradients += found[0]
        sizes.append(len(found[0]))
        limits.append(limit)
        dtypes.append(operators.dtype_of(found[0]))
    if len(_distinct(gradients)[0]) < len(gradients):
        return NotImplemented
    each = torch.ops.fusedclip.clip_scopes_(gradients, sizes, limits, p, zero).unbind()
    return {name: norm.to(dtype) for name, norm, dtype in zip(scopes, each, dtypes, strict=True)}


@_in_place_of(clip.clip_grads_with_norm_)
def _trace_scale_(
    parameters: Tensors, max_norm: Limit, total_norm: Limit, foreach: bool | None = None, *, grad_attr: str = "grad"
) -> Any:
    found = _found(parameters, grad_attr)
    limit, norm = _limit(max_norm, found), _limit(total_norm, found)
    if found is None or limit is None or norm is None:
        return NotImplemented
    return torch.ops.fusedclip.scale_(found[0], limit, norm)


@_in_place_of(clip.clip_grad_value_)
def _trace_clamp_(
    parameters: Tensors, clip_value: Limit, foreach: bool | None = None, *, grad_attr: str = "grad"
) -> Any:
    found = _found(parameters, grad_attr)
    if found is None or not isinstance(clip_value, int | float) or not clip_value >= 0:
        return NotImplemented
    return torch.ops.fusedclip.clamp_(found[0], float(clip_value))


@_in_place_of(stats.get_grad_stats)
def _trace_stats(tensors: Tensors, norm_type: object = 2.0, *, group: object = None) -> Any:
    found, p = _found(tensors, None), _order(norm_type)
    if found is None or p not in norms.ROWS or group is not None:
        return NotImplemented
    return stats.as_stats(*torch.ops.fusedclip.stats(*found, p))


@_in_place_of(stats.clip_grad_norm_with_stats_)
def _trace_clip_with_stats_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: object = 2.0,
    error_if_nonfinite: bool = False,
    *,
    on_nonfinite: object = "propagate",
    group: object = None,
    counted_elsewhere: object = None,
    grad_attr: str = "grad",
) -> Any:
    found, p = _found(parameters, grad_attr), _order(norm_type)
    limit, zero = _limit(max_norm, found), _zero(on_nonfinite)
    plain = not error_if_nonfinite and group is None and counted_elsewhere is None
    if found is None or p not in norms.ROWS or limit is None or zero is None or not plain:
        return NotImplemented
    return stats.as_stats(*torch.ops.fusedclip.clip_with_stats_(*found, limit, p, zero))


def _found(items: Tensors, attribute: str | None) -> tuple[list[Tensor], list[int]] | None:
    """Gradients for an operator, and of each entry the place of its own or -1; None if there are none for one."""
    entries = [items] if isinstance(items, Tensor) else list(items)
    if not all(isinstance(entry, Tensor) for entry in entries):
        return None
    gradients = entries if attribute is None else [getattr(entry, attribute, None) for entry in entries]
    distinct, places = _distinct(gradients)
    return (distinct, places) if distinct and all(_is_plain(gradient) for gradient in distinct) else None


def _distinct(gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    distinct: list[Tensor] = []
    place_of: dict[Tensor, int] = {}
    places = []
    for gradient in gradients:
        if gradient is None:
            places.append(-1)
            continue
        if gradient not in place_of:
            place_of[gradient] = len(distinct)
            distinct.append(gradient)
        places.append(place_of[gradient])
    return distinct, places


def _is_plain(gradient: Tensor) -> bool:
    """Of an exact type, dense, and of a dtype that engines read."""
    if type(gradient) not in (Tensor, torch.nn.Parameter) or gradient.layout != torch.strided:
        return False
    channels_last = gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient.dtype in FLOATING and (gradient.is_contiguous() or channels_last)


def _limit(limit: object, found: tuple[list[Tensor], list[int]] | None) -> Tensor | None:
    """A limit (or a norm) for an operator on these gradients, or None."""
    if isinstance(limit, int | float) and limit >= 0 and found is not None:
        # A product is the form in which dynamo keeps a number that changes out of its guards.
        return torch.ones((), dtype=torch.float64, device=found[0][0].device) * limit
    return limit if type(limit) is Tensor else None


def _order(norm_type: object) -> float | None:
    if norm_type == "inf":
        return math.inf
    return float(norm_type) if isinstance(norm_type, int | float) and norm_type == norm_type else None


def _zero(on_nonfinite: object) -> bool | None:
    return on_nonfinite == "zero" if on_nonfinite in ("zero", "propagate") else None
