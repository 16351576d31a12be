"""What is known of one step, and how it is written in a line of JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One step, as the host knows it when its numbers have arrived. Norms are those before clipping."""

    step: int
    norm: float  # of all gradients together
    limit: float | None  # what it was held to; None where each gradient has a limit of its own
    coef: float  # what gradients were multiplied by: the smallest, if each has its own
    zeros: int  # elements that are exactly 0
    largest: float  # magnitude of an element
    nonfinite: tuple[str, ...]  # parameters with a NaN or an inf
    layers: tuple[float | None, ...] | None  # the norm of each parameter, None without a gradient; None if not wanted

    @property
    def clipped(self) -> bool:
        return self.coef < 1

    def as_json(self) -> str:
        layers = None if self.layers is None else [_number(norm) for norm in self.layers]
        row = {
            "step": self.step, "norm": _number(self.norm), "limit": _number(self.limit), "coef": _number(self.coef),
            "clipped": self.clipped, "zeros": self.zeros, "largest": _number(self.largest),
            "nonfinite": self.nonfinite, "layers": layers,
        }  # fmt: skip
        return json.dumps({name: value for name, value in row.items() if name != "layers" or value is not None})


def header(names: Sequence[str], sizes: Sequence[int]) -> str:
    """The first line of a run: what its records are of."""
    return json.dumps({"fusedclip": "monitor", "parameters": list(names), "sizes": list(sizes)})


def is_header(line: bytes) -> bool:
    return line.startswith(b'{"fusedclip"')


def read_record(row: dict[str, Any], count: int) -> Record:
    """Of a run with so many parameters."""
    layers = row.get("layers")
    if layers is not None and len(layers) != count:
        raise ValueError(f"{len(layers)} layers of {count}")
    return Record(
        int(row["step"]), float(row["norm"]), None if row["limit"] is None else float(row["limit"]),
        float(row["coef"]), int(row["zeros"]), float(row["largest"]), tuple(row["nonfinite"]),
        None if layers is None else tuple(None if norm is None else float(norm) for norm in layers),
    )  # fmt: skip


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are strings, which float() reads."""
    return value if value is None or math.isfinite(value) else str(value)
