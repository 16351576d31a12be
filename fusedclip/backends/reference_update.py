"""The specification of `Updater`, in plain torch, on any device. Slow, and meant to be read first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._extension import subnormals_count
from ..gradients import store
from ..interrupts import Part, all_or_none
from ..updates import UpdateRule, float_factors, join, round_away, split
from .updater import Streams, Updater


class ReferenceUpdater(Updater):
    @torch.no_grad()
    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        def parts_of(place: int, row: int) -> list[Part]:
            written: list[tuple[Tensor, Tensor]] = []

            def move() -> None:
                moves = _moved(streams, place, rules[row], coefs[row])
                written[:] = [(old, new if skip is None else torch.where(skip != 0, old, new)) for old, new in moves]

            def write() -> None:
                for tensor, moved in written:
                    store(tensor, moved)
                streams.is_written = True

            return [(move, lambda: False), (write, lambda: False)]  # either may be done twice

        with subnormals_count(streams.device):
            all_or_none([part for place, row in enumerate(streams.rows) for part in parts_of(place, row)])


def _moved(streams: Streams, place: int, rule: UpdateRule, coef: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What is written of one parameter, and what it becomes."""
    parameter, master = streams.parameters[place], streams.masters[place]
    states = [state[place] for state in streams.states]
    arithmetic = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    sign = -1 if rule.maximize else 1
    gradient = streams.gradients[place].to(arithmetic)
    if arithmetic == torch.float64:
        gradient = gradient * (sign * coef)
    else:
        rest, power = float_factors(coef)
        gradient = gradient * (sign * rest) * power
    written = []
    step = torch.ones((), device=streams.device)
    if streams.steps is not None:
        step = streams.steps[place] + 1
        written.append((streams.steps[place], step))
    value, moved = rule.move(
        _value(parameter, master, arithmetic), gradient, tuple(s.to(arithmetic) for s in states), step.double()
    )
    return [*written, *zip(states, moved, strict=True), *_stored(parameter, master, value)]


def _value(parameter: Tensor, master: Tensor | None, arithmetic: torch.dtype) -> Tensor:
    if master is None:
        return parameter.to(arithmetic)
    return master if master.dtype == torch.float32 else join(parameter, master)


def _stored(parameter: Tensor, master: Tensor | None, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    if master is None:
        return [(parameter, value)]
    rounded = round_away(value) if parameter.dtype == torch.bfloat16 else value
    return [(parameter, rounded), (master, value if master.dtype == torch.float32 else split(value)[1])]
