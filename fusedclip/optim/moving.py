"""A step of an optimizer of our own, from param groups to the engines' update passes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Streams, Updater, updating
from ..backends.reference_update import ReferenceUpdater
from ..dtypes import FLOATING, name_of
from ..norms import follow
from ..passes import insist
from ..torch_internals import increment_version, is_dtensor
from ..updates import UpdateRule
from .limits import Measured
from .states import Keeping, State, complete

_PLAIN = {Tensor, torch.nn.Parameter}
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
        parameters = [[p for p in groups[row]["params"] if p.grad is not None] for row in rows]
        numbers = [number for number, own in enumerate(parameters) for _ in own]
        together = [p for own in parameters for p in own]
        if together:
            streams = _streams(together, numbers, rules[rows[0]], states, keeping)
            calls += _calls(streams, together, [rules[row] for row in rows], rows)
    return calls


def _streams(
    parameters: list[Tensor], rows: list[int], rule: UpdateRule, states: dict[Tensor, State], keeping: Keeping
) -> Streams:
    own = [states[parameter] for parameter in parameters]
    try:
        kept = _kept(parameters, own, rule, keeping)
    except KeyError:  # the first step, or that of a parameter that had no gradient yet
        for parameter, state in zip(parameters, own, strict=True):
            complete(state, parameter, rule.states, rule.counts_steps, keeping)
        kept = _kept(parameters, own, rule, keeping)
    moments, masters, steps = kept
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    return Streams(parameters[0].device, rows, parameters, gradients, moments, masters, steps)


def _kept(
    parameters: list[Tensor], states: list[State], rule: UpdateRule, keeping: Keeping
) -> tuple[tuple[list[Tensor], ...], list[Tensor | None], list[Tensor] | None]:
    masters: list[Tensor | None] = [None] * len(states)
    if keeping.master is not None:
        keys = [keeping.key_for(parameter) for parameter in parameters]
        masters = [None if key is None else state[key] for key, state in zip(keys, states, strict=True)]
    steps = [state["step"] for state in states] if rule.counts_steps else None
    return tuple([state[name] for state in states] for name in rule.states), masters, steps


def _calls(streams: Streams, owners: list[Tensor], rules: list[UpdateRule], groups: list[int]) -> list[Call]:
    if not set(map(type, owners)) <= _PLAIN:
        streams = _local(streams)
    calls: list[Call] = []
    devices = dict.fromkeys([parameter.device for parameter in streams.parameters])
    for device in devices:
        places = None if len(devices) == 1 else [i for i, p in enumerate(streams.parameters) if p.device == device]
        here, own = _picked(streams, owners, places)
        updater = updating(device)
        misfits = updater.misfits(here)
        if misfits:
            for place in misfits:
                _check(here, place)
            calls.append(Call(_REFERENCE, *_picked(here, own, misfits), rules, groups))
            here, own = _picked(here, own, sorted(set(range(len(own))) - set(misfits)))
        if own:
            if misfits:
                updater.misfits(here)  # of these there are none, and their table is made
            calls.append(Call(updater, here, own, rules, groups))
    return calls


def _picked(streams: Streams, owners: list[Tensor], places: list[int] | None) -> tuple[Streams, list[Tensor]]:
    """Some of the parameters, with their owners; None: all."""
    if places is None:
        return streams, owners

    def pick(stream: list[Any]) -> list[Any]:
        return [stream[place] for place in places]

    s = streams
    picked = Streams(
        s.parameters[places[0]].device if places else s.device,
        pick(s.rows),
        pick(s.parameters),
        pick(s.gradients),
        tuple(map(pick, s.states)),
        pick(s.masters),
        None if s.steps is None else pick(s.steps),
    )
    return picked, pick(owners)


def _local(streams: Streams) -> Streams:
    """What this rank has of DTensors. A gradient that is placed otherwise than its parameter is brought there."""

    def shard(tensor: Any) -> Any:
        return tensor._local_tensor if is_dtensor(tensor) else tensor

    def placed(gradient: Any, parameter: Any) -> Any:
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
        if type(tensor) not in _PLAIN:
            raise TypeError(f"{who} is a {type(parameter).__name__}, or has such a gradient or state; use torch.optim")
        if tensor.dtype not in FLOATING:
            way_out = "; give the optimizer torch.view_as_real(...) of it" if tensor.is_complex() else ""
            raise TypeError(
                f"{who}, its gradient or state is {tensor.dtype}; optimizers move "
                f"{', '.join(sorted(map(name_of, FLOATING)))}{way_out}"
            )
    if streams.masters[place] is not None:
        beside.append(streams.masters[place])  # type: ignore[arg-type]
    for tensor in beside:
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            raise ValueError(
                f"{who} on {parameter.device} has a gradient or state of shape {tuple(tensor.shape)} on "
                f"{tensor.device}; load a state_dict of the same model, after moving it to its device"
            )


def move(calls: list[Call], measured: Measured) -> None:
    """Make the step, whole even if an interrupt arrives on the way."""
    interrupted: KeyboardInterrupt | None = None
    for number, call in enumerate(calls):
        device = call.streams.device
        skip = None if measured.skip is None else follow(measured.skip, device)
        coefs = follow(measured.coefs, device)
        if len(call.groups) < len(coefs):
            coefs = torch.stack([coefs[i] for i in call.groups])
        rules = [_there(rule, device) for rule in call.rules]
        before = _updates(call)
        while True:
            try:
                call.updater.update_(call.streams, rules, coefs, skip)
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
                if _updates(call) == before and call.streams.table is not None:
                    if number == 0:
                        raise  # nothing at all has been written
                    continue
            break
        insist(lambda call=call: increment_version(call.written + call.streams.parameters))  # type: ignore[misc]
    if interrupted is not None:
        raise interrupted


def _updates(call: Call) -> int:
    return 0 if call.streams.table is None else int(call.streams.table.updates)


def _there(rule: UpdateRule, device: torch.device) -> UpdateRule:
    """The rule with a learning rate that needs nobody to wait: a number, or one on the device."""
    if not isinstance(rule.lr, Tensor):
        return rule
    return rule._replace(lr=rule.lr.item() if rule.lr.is_cpu else follow(rule.lr, device).double().reshape(()))
