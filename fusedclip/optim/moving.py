"""A step of an optimizer of our own, from param groups to the engines' update passes."""

from collections.abc import Sequence
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import shown
from ..backends import Streams, Updater, updating
from ..backends.reference_update import ReferenceUpdater
from ..dtypes import FLOATING, name_of
from ..gradients.layouts import EXACT_TYPES, overlaps
from ..interrupts import Part, all_or_none
from ..torch_internals import dispatches, increment_version, is_dtensor
from ..transfers import follow
from ..updates import UpdateRule
from .limits import Measured
from .states import Keeping, State, complete

_REFERENCE = ReferenceUpdater()


class Call(NamedTuple):
    """What one engine is asked for."""

    updater: Updater
    streams: Streams
    written: list[Tensor]  # the parameters, as autograd knows them
    rules: list[UpdateRule]  # of one kind
    groups: list[int]  # which param group follows each


def prepare(
    groups: Sequence[dict[str, Any]], rules: Sequence[UpdateRule], states: dict[Tensor, State], keeping: Keeping
) -> list[Call]:
    """The calls of a step, in which everything is checked. Missing states are made; nothing else has changed.

    Rules of one kind are moved together, on each device.
    """
    calls: list[Call] = []
    for kind in dict.fromkeys(rule.kind for rule in rules):
        rows = [row for row, rule in enumerate(rules) if rule.kind == kind]
        parameters: list[Tensor] = []
        gradients: list[Any] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            own = groups[row]["params"]
            found = [parameter.grad for parameter in own]
            if NoneType in set(map(type, found)):
                own = [parameter for parameter, gradient in zip(own, found, strict=True) if gradient is not None]
                found = [gradient for gradient in found if gradient is not None]
            parameters += own
            gradients += found
            numbers += [number] * len(own)
        if parameters:
            streams = _streams(parameters, gradients, numbers, rules[rows[0]], states, keeping)
            calls += _calls(streams, parameters, [rules[row] for row in rows], rows)
    return calls


def _streams(
    parameters: list[Tensor],
    gradients: list[Tensor],
    rows: list[int],
    rule: UpdateRule,
    states: dict[Tensor, State],
    keeping: Keeping,
) -> Streams:
    keeps = bool(rule.states) or keeping.master is not None
    own = [states[parameter] for parameter in parameters] if keeps else []
    try:
        kept = _kept(parameters, own, rule, keeping)
    except KeyError:  # the first step, or that of a parameter that had no gradient yet
        for parameter, state in zip(parameters, own, strict=True):
            complete(state, parameter, rule.states, rule.counts_steps, keeping)
        kept = _kept(parameters, own, rule, keeping)
    return Streams(parameters[0].device, rows, parameters, gradients, *kept)


def _kept(
    parameters: list[Tensor], states: list[State], rule: UpdateRule, keeping: Keeping
) -> tuple[tuple[list[Tensor], ...], list[Tensor | None], list[Tensor] | None]:
    masters: list[Tensor | None] = [None] * len(parameters)
    if keeping.master is not None:
        keys = [keeping.key_for(parameter) for parameter in parameters]
        masters = [None if key is None else state[key] for key, state in zip(keys, states, strict=True)]
    steps = [state["step"] for state in states] if rule.counts_steps else None
    return tuple([state[name] for state in states] for name in rule.states), masters, steps


def _calls(streams: Streams, owners: list[Tensor], rules: list[UpdateRule], groups: list[int]) -> list[Call]:
    if not set(map(type, owners)) <= EXACT_TYPES:
        streams = _local(streams)
    updater = updating(streams.device)
    misfits = updater.misfits(streams)
    if not misfits:
        return [Call(updater, streams, owners, rules, groups)]
    calls: list[Call] = []
    elsewhere = [place for place in misfits if streams.parameters[place].device != streams.device]
    if elsewhere:
        calls += _calls(*_picked(streams, owners, elsewhere), rules, groups)
    odd = sorted({*misfits} - {*elsewhere})
    for place in odd:
        _check(streams, place)
    if odd:
        calls.append(Call(_REFERENCE, *_picked(streams, owners, odd), rules, groups))
    rest = sorted({*range(len(owners))} - {*misfits})
    if rest:
        calls += _calls(*_picked(streams, owners, rest), rules, groups)
    return calls


def _picked(streams: Streams, owners: list[Tensor], places: list[int]) -> tuple[Streams, list[Tensor]]:
    """Some of the parameters, with their owners."""

    def pick(stream: list[Any]) -> list[Any]:
        return [stream[place] for place in places]

    s, parameters = streams, pick(streams.parameters)
    states, steps = tuple(map(pick, s.states)), None if s.steps is None else pick(s.steps)
    return Streams(
        parameters[0].device, pick(s.rows), parameters, pick(s.gradients), states, pick(s.masters), steps
    ), pick(owners)


def _local(streams: Streams) -> Streams:
    """What this rank has of DTensors, and what subclasses are that only bear another name. A gradient that is placed
    otherwise than its parameter is brought there."""

    def shard(tensor: Any) -> Any:
        if is_dtensor(tensor):
            return tensor._local_tensor
        is_renamed = isinstance(tensor, Tensor) and type(tensor) not in EXACT_TYPES and not dispatches(tensor)
        return tensor.as_subclass(Tensor) if is_renamed else tensor

    def placed(gradient: Any, parameter: Any) -> Any:
        if is_dtensor(parameter) and any(placement.is_partial() for placement in parameter.placements):
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} is a DTensor of which each rank holds one part of a "
                "sum, which no step moves rightly; .redistribute() it first"
            )
        if is_dtensor(gradient) and is_dtensor(parameter) and gradient.placements != parameter.placements:
            return gradient.redistribute(parameter.device_mesh, parameter.placements)
        return gradient

    s = streams
    gradients = [placed(g, p) for g, p in zip(s.gradients, s.parameters, strict=True)]
    locals_ = [[shard(tensor) for tensor in stream] for stream in (s.parameters, gradients, s.masters, *s.states)]
    parameters, gradients, masters, *states = locals_
    return Streams(parameters[0].device, s.rows, parameters, gradients, tuple(states), masters, s.steps)


def _check(streams: Streams, place: int) -> None:
    """Raise for what not even the reference moves."""
    parameter, gradient = streams.parameters[place], streams.gradients[place]
    who = f"a parameter of shape {tuple(parameter.shape)}"
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{who} has a sparse gradient; use torch.optim.SparseAdam or torch.optim.SGD for it, or sparse=False in "
            "its embedding"
        )
    beside = [gradient, *(state[place] for state in streams.states)]
    for tensor in (parameter, *beside):
        if type(tensor) not in EXACT_TYPES:
            raise TypeError(f"{who} is a {type(parameter).__name__}, or has such a gradient or state; use torch.optim")
        if tensor.dtype not in FLOATING:
            way_out = "; give the optimizer torch.view_as_real(...) of it" if tensor.is_complex() else ""
            raise TypeError(
                f"{who}, its gradient or state is {tensor.dtype}; optimizers move "
                f"{', '.join(sorted(map(name_of, FLOATING)))}{way_out}"
            )
    if parameter.is_meta:
        raise TypeError(
            f"{who} is on the meta device and has no elements; use .to_empty(device=...) and load the model"
        )
    if streams.steps is not None and not isinstance(streams.steps[place], Tensor):
        raise TypeError(f'the state "step" of {who} must be a tensor, got {shown(streams.steps[place])}')
    if streams.masters[place] is not None:
        beside.append(streams.masters[place])  # type: ignore[arg-type]
    if any(map(overlaps, (parameter, *beside[1:]))):
        raise ValueError(f"{who} or its state is expanded: several of its elements share memory; .clone() it first")
    for tensor in beside:
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            raise ValueError(
                f"{who} on {parameter.device} has a gradient or state of shape {tuple(tensor.shape)} on "
                f"{tensor.device}; load a state_dict of the same model, after moving it to its device"
            )


def move(calls: list[Call], measured: Measured) -> None:
    """Make the step, whole even if an interrupt arrives on the way."""
    all_or_none([part for call in calls for part in _parts(call, measured)])


def _parts(call: Call, measured: Measured) -> list[Part]:
    device = call.streams.device
    skip = None if measured.skip is None else follow(measured.skip, device)
    coefs = follow(measured.coefs, device)
    if len(call.groups) < len(coefs):
        coefs = torch.stack([coefs[i] for i in call.groups])
    rules = [_there(rule, device) for rule in call.rules]
    before = _updates(call)

    def has_written() -> bool:
        if isinstance(call.updater, ReferenceUpdater):
            return call.streams.is_written
        return call.streams.table is None or _updates(call) > before

    update = partial(call.updater.update_, call.streams, rules, coefs, skip)
    return [(update, has_written), (partial(_tell, call), lambda: False)]


def _tell(call: Call) -> None:
    """Autograd, of what was written: of DTensors both what they are and what is in them."""
    written = call.written
    if call.streams.parameters is not written:
        local = [p for p, owner in zip(call.streams.parameters, written, strict=True) if p is not owner]
        written = written + local
    increment_version(written)


def _updates(call: Call) -> int:
    return 0 if call.streams.table is None else int(call.streams.table.updates)


def _there(rule: UpdateRule, device: torch.device) -> UpdateRule:
    """The rule with a learning rate that needs nobody to wait: a number, or one on the device."""
    if not isinstance(rule.lr, Tensor):
        return rule
    return rule._replace(lr=follow(rule.lr, device).double().reshape(()))
