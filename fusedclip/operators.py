"""The operators of `torch.ops.fusedclip`, which stand in graphs where eager calls have functions; compile.py uses them.

`gradients` are distinct, plain and dense; `entries` has for each parameter the place of its gradient among them, or -1.
A limit is a tensor of one element: with a number, each new one would make a new graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from . import clip, norms, passes, reading, stats
from .arguments import check_max_norm, check_total_norm
from .gradients import gather
from .norms import ClipRule
from .scopes import Scope, measure_scopes, scale_scopes_, scope_result
from .transfers import index_on, on_device

Function = Callable[..., Any]

_LIBRARY = Library("fusedclip", "DEF")  # type: ignore[no-untyped-call]


def _operator(schema: str, fake: Function) -> Callable[[Function], Function]:
    """Decorator: the function is the operator with this schema, and `fake` makes empty results of its form."""

    def define(function: Function) -> Function:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        register_fake(f"fusedclip::{name}", fake, lib=_LIBRARY)
        return function

    return define


def dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """Of norms."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _one(tensors: list[Tensor], *_: object) -> Tensor:
    return tensors[0].new_empty((), dtype=dtype_of(tensors))


def _each(tensors: list[Tensor], entries: list[int], *_: object) -> Tensor:
    return tensors[0].new_empty(len(entries), dtype=dtype_of(tensors))


def _each_and_all(tensors: list[Tensor], entries: list[int], *_: object) -> tuple[Tensor, Tensor]:
    width = len(entries) + 1
    return tensors[0].new_empty(3, width, dtype=dtype_of(tensors)), tensors[0].new_empty(2, width, dtype=torch.int64)


def _nothing(*_: object) -> None:
    return None


@_operator("total_norm(Tensor[] tensors, float p) -> Tensor", _one)
def _total_norm(tensors: list[Tensor], p: float) -> Tensor:
    return clip.get_total_norm(tensors, p)


@_operator("norms(Tensor[] tensors, int[] entries, float p) -> Tensor", _each)
def _norms(tensors: list[Tensor], entries: list[int], p: float) -> Tensor:
    return clip.get_per_tensor_norms([tensors[place] for place in entries], p)


@_operator("clip_norm_(Tensor(a!)[] gradients, Tensor max_norm, float p, bool zero) -> Tensor", _one)
def _clip_norm_(gradients: list[Tensor], max_norm: Tensor, p: float, zero: bool) -> Tensor:
    rule = ClipRule(check_max_norm(max_norm), zero)
    return passes.clip_(gather(gradients, None, p=p), p, rule).norm


@_operator("clip_each_(Tensor(a!)[] gradients, int[] entries, Tensor max_norm, float p) -> Tensor", _each)
def _clip_each_(gradients: list[Tensor], entries: list[int], max_norm: Tensor, p: float) -> Tensor:
    rule, grads = ClipRule(check_max_norm(max_norm)), gather(gradients, None, p=p)
    each, by_gradient = reading.norm_of_each(grads, p)
    passes.scale_(grads, rule(each))
    return reading.as_result(_by_entry(by_gradient, entries), grads)


@_operator("clip_scopes_(Tensor(a!)[] gradients, int[] sizes, Tensor[] max_norms, float p, bool zero) -> Tensor", _each)
def _clip_scopes_(gradients: list[Tensor], sizes: list[int], max_norms: list[Tensor], p: float, zero: bool) -> Tensor:
    scopes, first = [], 0
    for size, max_norm in zip(sizes, max_norms, strict=True):
        scopes.append(Scope(range(first, first + size), ClipRule(check_max_norm(max_norm), zero)))
        first += size
    grads = gather(gradients, None, p=p)
    clipped = measure_scopes(grads, p, scopes)
    scale_scopes_(grads, scopes, [one.coef for one in clipped], zero=zero)
    results = [scope_result(one.norm, grads, scope) for one, scope in zip(clipped, scopes, strict=True)]
    return torch.stack([result.to(grads.dtype) for result in results])


@_operator("scale_(Tensor(a!)[] gradients, Tensor max_norm, Tensor total_norm) -> ()", _nothing)
def _scale_(gradients: list[Tensor], max_norm: Tensor, total_norm: Tensor) -> None:
    rule, norm, grads = ClipRule(check_max_norm(max_norm)), check_total_norm(total_norm), gather(gradients, None)
    passes.scale_(grads, rule(on_device(norm, grads.device)))


@_operator("clamp_(Tensor(a!)[] gradients, float clip_value) -> ()", _nothing)
def _clamp_(gradients: list[Tensor], clip_value: float) -> None:
    passes.clamp_(gather(gradients, None, p=None), clip_value)


@_operator("stats(Tensor[] tensors, int[] entries, float p) -> (Tensor, Tensor)", _each_and_all)
def _stats(tensors: list[Tensor], entries: list[int], p: float) -> tuple[Tensor, Tensor]:
    grads = gather(tensors, None, p=norms.MODULUS)
    by_gradient, total = reading.stats_of(reading.stats_each(grads), grads)
    return stats.finished(_by_entry(by_gradient, entries), total, grads, p)


@_operator(
    "clip_with_stats_(Tensor(a!)[] gradients, int[] entries, Tensor max_norm, float p, bool zero) -> (Tensor, Tensor)",
    _each_and_all,
)
def _clip_with_stats_(
    gradients: list[Tensor], entries: list[int], max_norm: Tensor, p: float, zero: bool
) -> tuple[Tensor, Tensor]:
    rule, grads = ClipRule(check_max_norm(max_norm), zero), gather(gradients, None, p=norms.MODULUS)
    by_gradient, total = stats.clip_with_stats_(grads, p, rule)
    return stats.finished(_by_entry(by_gradient, entries), total, grads, p)


def _by_entry(values: Tensor, entries: list[int]) -> Tensor:
    """Values in the order of the gradients, [..., U], as those of the parameters, [..., T]."""
    return norms.spread(values, index_on(entries, values.device))
