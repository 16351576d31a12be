"""The drop-in functions: torch's names, argument order and defaults; what is ours is keyword-only."""

import math
from collections.abc import Mapping
from typing import Literal, SupportsFloat

from torch import Tensor

from . import passes, reading
from .arguments import (
    Limit,
    Tensors,
    as_list,
    check_clip_value,
    check_max_norm,
    check_norm_type,
    check_scope_limits,
    check_total_norm,
    on_nonfinite_is,
    parameter_list,
    refuse_repeated,
)
from .gradients import gather, gather_given
from .norms import ClipRule, constant_rule
from .peers import Elsewhere, Group, check_group
from .scopes import Scope, measure_scopes, scale_scopes_, scope_result
from .torch_internals import is_tracing, modes, outside_graphs, refuse_tracing

_PROPAGATE = "propagate"
_MEASURE = ClipRule(math.inf)


@outside_graphs
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: SupportsFloat | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: Literal["propagate", "zero"] = "propagate",
    group: Group | None = None,
    counted_elsewhere: Elsewhere | None = None,
    grad_attr: str = "grad",
) -> Tensor:
    """Scale the gradients so that their norm, taken together, is at most `max_norm`. In place; nothing is written
    when nothing is clipped.

    Equivalent, with every gradient g read as fp64::

        norm = sum(abs(x) ** norm_type for g in grads for x in g) ** (1 / norm_type)
        coef = min(1, max_norm / (norm + 1e-6))
        for g in grads: g *= coef

    Args:
        parameters: tensors whose gradients are clipped (or one tensor). Those without a gradient are skipped; a
            gradient listed twice counts once. Gradients: fp32, fp64, bf16, fp16 or complex, mixed as you like; any
            shape; strided or sparse COO; on any device, on several too. DTensors (FSDP2, tensor parallelism) of any
            meshes, alone or beside others: every rank must call, with the same parameters, and gets the norm of the
            whole, from one all-reduce per set of ranks (docs/distributed.md).
        max_norm: at least 0, in the unit of the gradients. `inf` only measures. A 0-d tensor is taken as it is, without
            waiting for its device.
        norm_type: p of the p-norm: any number, inf and "inf" included; p = 0 and -inf as in torch.
        error_if_nonfinite: raise if the norm is NaN or inf. Waits for the device.
        foreach: accepted for compatibility; every engine takes all gradients at once.
        on_nonfinite: with a norm of NaN or inf, "propagate" does what the formula says (NaN everywhere; inf turns inf
            into NaN and the rest into 0), "zero" stores zeros, as it does for a `max_norm` of 0. Neither waits for the
            device.
        group: a process group, or several in a list, whose ranks hold different gradients of one model (pipeline
            stages, hand-made shards, FSDP1): the norm is taken over all of them, one all-reduce of a few numbers each,
            after those of DTensors. Gradients that all its ranks hold alike count once per rank, which is too often
            (FSDP1's NO_SHARD: the norm is too large by the square root of the number of ranks). Every rank must call,
            and none may raise on its way: a bad gradient on one rank leaves the others waiting for it.
        counted_elsewhere: parameters (in a set or list, or a function that tells) whose gradients another rank of
            `group` counts, say tied embeddings on two pipeline stages. They are scaled here.
        grad_attr: the attribute that holds the gradient, e.g. "main_grad".

    Returns:
        The norm before clipping: 0-d, fp32 (fp64 if any gradient is), on the first gradient's device. tensor(0.) if
        there are no gradients. Does not wait for the device unless `error_if_nonfinite`.

    Raises:
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.

    Deterministic: the same gradients give the same bits, whatever the number of threads.

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", algorithm 1;
    the constant 1e-6 is torch's.
    """
    if is_tracing() or modes._is_in_torch_dispatch_mode:  # written out: a function call is 2 % of the smallest clip
        refuse_tracing()
    p, limit = check_norm_type(norm_type), check_max_norm(max_norm)
    zero = on_nonfinite is not _PROPAGATE and on_nonfinite_is("zero", on_nonfinite)
    peers = None if group is None and counted_elsewhere is None else check_group(group, counted_elsewhere)
    items = parameter_list(parameters, grad_attr)
    rule = constant_rule(limit + 0.0, zero) if type(limit) is float else ClipRule(limit, zero)
    return passes.clip_list_(items, grad_attr, p, rule, error_if_nonfinite, peers)


@outside_graphs
def get_total_norm(
    tensors: Tensors,
    norm_type: SupportsFloat | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Group | None = None,
) -> Tensor:
    """The norm of tensors (gradients, not parameters) taken together. Reads each once and writes nothing.

    Arguments, result and errors are those of `clip_grad_norm_`.
    """
    if is_tracing() or modes._is_in_torch_dispatch_mode:
        refuse_tracing()
    p = check_norm_type(norm_type)
    peers = None if group is None else check_group(group)
    items = as_list(tensors, "tensors")
    return passes.clip_list_(items, None, p, _MEASURE, error_if_nonfinite, peers)


@outside_graphs
def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: Limit,
    total_norm: Limit,
    foreach: bool | None = None,
    *,
    grad_attr: str = "grad",
) -> None:
    """Scale the gradients by min(1, max_norm / (total_norm + 1e-6)), in place; nothing is written where that is 1.

    Args:
        parameters, max_norm, foreach, grad_attr: as in `clip_grad_norm_`.
        total_norm: what `get_total_norm` returned, or a number; on any device, none is waited for.

    Raises:
        TypeError, ValueError: also for a `total_norm` below 0. Every gradient is then as it was.
    """
    if is_tracing() or modes._is_in_torch_dispatch_mode:
        refuse_tracing()
    limit, norm = check_max_norm(max_norm), check_total_norm(total_norm)
    items = parameter_list(parameters, grad_attr)
    rule = constant_rule(limit + 0.0, False) if type(limit) is float else ClipRule(limit)
    passes.scale_list_(items, grad_attr, rule, norm)


@outside_graphs
def clip_grad_value_(
    parameters: Tensors, clip_value: Limit, foreach: bool | None = None, *, grad_attr: str = "grad"
) -> None:
    """Clamp every gradient element into [-clip_value, clip_value], in place and in one pass; NaN stays NaN.

    Args:
        parameters, foreach, grad_attr: as in `clip_grad_norm_`; complex gradients are refused, as in torch.
        clip_value: at least 0, in the unit of the gradients. A 0-d tensor is read, which waits for its device.

    Raises:
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.
    """
    refuse_tracing()
    bound = check_clip_value(clip_value)
    passes.clamp_(gather_given(parameter_list(parameters, grad_attr), grad_attr, p=None), bound)


@outside_graphs
def get_per_tensor_norms(tensors: Tensors, norm_type: SupportsFloat | str = 2.0) -> Tensor:
    """The norm of each tensor by itself, from one read pass over all of them and without waiting for the device.

    Returns:
        [T], one per tensor in the order given, fp32 (fp64 if any tensor is), on the first tensor's device. Of DTensors
        the norms of the whole tensors, after one all-reduce of as many numbers.
    """
    refuse_tracing()
    p = check_norm_type(norm_type)
    grads = gather(as_list(tensors, "tensors"), None, p=p)
    return reading.as_result(reading.norm_of_each(grads, p)[1], grads)


@outside_graphs
def clip_grad_norm_per_tensor_(
    parameters: Tensors, max_norm: Limit, norm_type: SupportsFloat | str = 2.0, *, grad_attr: str = "grad"
) -> Tensor:
    """Scale each gradient by itself so that its own norm is at most `max_norm`, in place.

    This is TensorFlow's clip_by_norm and Keras' clipnorm. Arguments and errors are those of `clip_grad_norm_`. Only the
    gradients that are clipped are written.

    Returns:
        [T], the norms before clipping, one per parameter in the order given (0 for one without a gradient), fp32 (fp64
        if any gradient is), on the first gradient's device. Does not wait for the device.
    """
    refuse_tracing()
    p, limit = check_norm_type(norm_type), check_max_norm(max_norm)
    grads = gather_given(parameter_list(parameters, grad_attr), grad_attr, p=p)
    each, by_entry = reading.norm_of_each(grads, p)
    passes.scale_(grads, ClipRule(limit)(each))
    return reading.as_result(by_entry, grads)


@outside_graphs
def clip_grad_norm_scopes_(
    scopes: Mapping[str, Tensors],
    max_norm: Limit | Mapping[str, Limit | None],
    norm_type: SupportsFloat | str = 2.0,
    error_if_nonfinite: bool = False,
    *,
    on_nonfinite: Literal["propagate", "zero"] = "propagate",
    group: Group | None = None,
    counted_elsewhere: Elsewhere | None = None,
    grad_attr: str = "grad",
) -> dict[str, Tensor]:
    """Clip several sets of gradients, each to a limit for its own norm, in one read pass and one write pass.

    Equivalent, but for the number of passes::

        {name: clip_grad_norm_(parameters, max_norm[name], norm_type) for name, parameters in scopes.items()}

    For experts beside dense layers, say, or for Muon's matrices, whose scale means nothing and which are measured,
    beside what AdamW trains (`{"matrices": None, "rest": 1.0}`). There is no norm of the whole: it follows from theirs.

    Args:
        scopes: the parameters of each scope, by its name. A parameter, or a gradient's memory, belongs to one at most.
        max_norm: of each scope by its name, None (as inf) only measuring; or one number, to which each is clipped by
            itself.
        norm_type, grad_attr: as in `clip_grad_norm_`.
        error_if_nonfinite, on_nonfinite: as in `clip_grad_norm_`, of each scope by itself; if one norm is not finite,
            `error_if_nonfinite` has no scope written.
        group, counted_elsewhere: as in `clip_grad_norm_`; all scopes share the all-reduces, and every rank must name
            them in the same order.

    Returns:
        The norm of each scope before clipping, by its name: 0-d, fp32 (fp64 if any of its gradients is), on the first
        gradient's device. Does not wait for the device unless `error_if_nonfinite`.

    Raises:
        KeyError: for a scope without a `max_norm`, or a `max_norm` without a scope.
        TypeError, ValueError, RuntimeError: naming the culprit; every gradient is then as it was.
    """
    refuse_tracing()
    p, zero = check_norm_type(norm_type), on_nonfinite_is("zero", on_nonfinite)
    peers = check_group(group, counted_elsewhere)
    limits = check_scope_limits(scopes, max_norm)
    items: list[Tensor] = []
    named: list[Scope] = []
    for name, parameters in scopes.items():
        own = parameter_list(parameters, grad_attr)
        named.append(Scope(range(len(items), len(items) + len(own)), ClipRule(limits[name], zero), str(name)))
        items += own
    if not named:
        return {}
    refuse_repeated(items, named, list(scopes))
    grads = gather_given(items, grad_attr, p=p, peers=peers)
    clipped = measure_scopes(grads, p, named, error_if_nonfinite=error_if_nonfinite)
    scale_scopes_(grads, named, [one.coef for one in clipped], zero=zero)
    results = [scope_result(one.norm, grads, scope) for one, scope in zip(clipped, named, strict=True)]
    return dict(zip(scopes, results, strict=True))
