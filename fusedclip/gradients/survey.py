"""A closer look at the entries of a list, one at a time: what the compiled sweep does not know, or all of them.

Two entries are one if they hold the same gradient object, or if their gradients and their parameters occupy the same
memory (tied weights with views of one buffer). Gradients of different parameters that lie in the same memory (autograd
makes such for a + b) each count.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..arguments import not_a_tensor, refuse_non_leaf
from .layouts import Flat, flatten, is_plain, parameter_memory
from .shards import local_of


class Survey:
    """What was found of the entries that were looked at, by their place in the list.

    `attribute` holds an entry's gradient; None: the entries are themselves the gradients, to be read only. `p` is the
    norm that is wanted of them, None if none is.
    """

    def __init__(self, attribute: str | None, p: float | None) -> None:
        self.attribute, self.p = attribute, p
        self.flats: dict[int, Flat] = {}
        self._seen: dict[Hashable, int] = {}
        self._kept: list[Tensor] = []  # so that no id in _seen is used again

    def look(self, place: int, entry: Any) -> Tensor | int | None:
        """What to read for the gradient: a plain dense tensor; the place of the entry that it was found at before; or
        None if there is none. Raises TypeError, RuntimeError or ValueError for what cannot be clipped, naming it."""
        gradient = self._gradient_of(place, entry)
        if gradient is None:
            return None
        gradient, entry = local_of(gradient), local_of(entry)
        if id(gradient) in self._seen:
            return self._seen[id(gradient)]
        flat = flatten(gradient, name_of(self.attribute, place), self.p, writable=self.attribute is not None)
        if flat.read is flat.write and flat.home is None and is_plain(gradient):
            flat.read = flat.write = gradient  # itself, which the sweep may meet again
        tied = (flat.memory, parameter_memory(entry)) if self.attribute is not None else (None, None)
        known = self._seen.get(tied) if None not in tied else None
        self._kept.append(gradient)
        self._seen[id(gradient)] = place if known is None else known
        if known is not None:
            return known
        self._seen[tied] = place
        self.flats[place] = flat
        return flat.read

    def _gradient_of(self, place: int, entry: Any) -> Tensor | None:
        if not isinstance(entry, Tensor):
            raise not_a_tensor(entry, place, "tensors" if self.attribute is None else "parameters")
        if self.attribute is None:
            return entry
        if self.attribute == "grad":
            refuse_non_leaf(entry, f"parameters[{place}]")
            gradient = entry.grad
        else:
            gradient = getattr(entry, self.attribute, None)
        if gradient is not None and not isinstance(gradient, Tensor):
            name = name_of(self.attribute, place)
            raise TypeError(f"{name} is a {type(gradient).__name__}, not a tensor")
        return gradient


def name_of(attribute: str | None, place: int) -> str:
    """How errors call an entry's gradient."""
    return f"tensors[{place}]" if attribute is None else f"parameters[{place}].{attribute}"


def is_double(flat: Flat) -> bool:
    """Whether the gradient is made of fp64 numbers, whatever it is read as."""
    return flat.write.dtype == torch.float64
