"""What an engine is to optimizers: one pass over parameters, gradients and states."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..updates import UpdateRule


@dataclass(slots=True, eq=False)
class Streams:
    """Parameters of one device with everything that an update reads and writes beside them.

    Item i of each list belongs to the same parameter: plain, dense tensors with the elements of `parameters[i]`, in the
    same order of memory. Dtypes are those of `dtypes.py`, of each tensor its own. No two parameters share memory;
    gradients may.
    """

    device: torch.device
    rows: list[int]  # which of the call's rules and coefficients
    parameters: list[Tensor]  # written
    gradients: list[Tensor]  # never written
    states: tuple[list[Tensor], ...]  # written; in the order of the rule's `states`
    masters: list[Tensor | None]  # written: the master (fp32), a split one's remainder (fp16), or None
    steps: list[Tensor] | None  # steps taken so far, fp32, 0-d, on the device; None if the rule does not count them
    table: Any = None  # the same as segments, for the compiled engines, which count their writes there
    is_written: bool = False  # by the reference


class Updater(ABC):
    """The face that an engine may have beside `Backend`."""

    def misfits(self, streams: Streams) -> list[int]:
        """The places of parameters that `update_` does not take as they are, such as one whose gradient has another
        order of memory: the reference, which takes them all, moves these. Their dtypes and shapes are looked at then.

        Raises ValueError if it sees that two parameters share memory.
        """
        return list(range(len(streams.parameters)))

    @abstractmethod
    def update_(self, streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
        """One step of every parameter, in one pass; never waits for a device.

        Of `rules`, which are of one kind, parameter i follows number rows[i], and its gradient counts as multiplied by
        `coefs[rows[i]]` (fp64, [len(rules)], on the device), which holds the clip and the inverse of a loss scale.
        `skip` (0-d, on the device): with anything but 0 in it nothing is written at all.

        What a kernel does with each parameter, unless it skips; updates.py has every formula:

            step = steps[i] + 1, stored by whoever has read it last        (if the rule counts steps)
            constants from the rule and the step, in fp64, rounded to the arithmetic's dtype A
            for each element, everything widened to A:
                x      = parameter | master | join(parameter, remainder)
                g      = gradient * (-rest if maximize else rest) * power   (A fp32; float_factors(coef))
                       | gradient * (-coef if maximize else coef)           (A fp64)
                x, states = rule.move(x, g, states, step)
                states are stored rounded to nearest even; x as the parameter, so, too; or, with a master, as that and
                its parameter: round_away if it is bf16, nearest even if it is fp16

        A is fp64 for fp64 parameters, else fp32. A coefficient of 1 is a factor like any other.
        """


class CompiledUpdater(Updater):
    """One that reads the streams as a table of the extension's."""

    def misfits(self, streams: Streams) -> list[int]:
        s = streams
        found = _extension.C.gather_updates(s.rows, s.parameters, s.gradients, s.states, s.masters, s.steps)
        if isinstance(found, list):
            return found  # what it could not read
        streams.table = found
        return []
