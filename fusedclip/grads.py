"""Parameters to gradients, legal or not, grouped by device.

The compiled `collect` takes the ordinary case (plain dense tensors of one device) in one sweep. Everything else goes
through `_layouts.flatten`, one gradient at a time, which either finds the memory behind it or says why it refuses.
"""

import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _extension
from ._layouts import FLOATING, Flat, flatten
from .torch_internals import user_stacklevel

__all__ = ["FLOATING", "Batch", "Gradients", "as_list", "gather", "gather_tensors", "mark_written"]


@dataclass(slots=True, eq=False)
class Batch:
    """Tensors of one device that an engine takes in one pass: real, floating, dense, each stretch of memory once."""

    tensors: list[Tensor]
    device: torch.device
    _table: Any = None

    @property
    def table(self) -> Any:
        """The same as segments, for the compiled engines."""
        if self._table is None:
            self._table = _extension.C.collect(self.tensors, None)
            if self._table is None or len(self._table) != len(self.tensors):
                raise RuntimeError(f"the extension cannot read one of these gradients: {self.tensors}")
        return self._table

    def mark_written(self, which: list[bool] | None = None) -> None:
        """Tell autograd that all of them, or those, have been written."""
        mark_written(self.tensors if which is None else [t for t, w in zip(self.tensors, which, strict=True) if w])


@dataclass(slots=True, eq=False)
class Gradients:
    """The gradients behind a list of parameters (or of tensors), ready to be read and written."""

    reads: list[Batch]  # what the norm is taken of
    writes: list[Batch]  # what is scaled: the same batches, but for p-norms of complex gradients
    dtype: torch.dtype  # of norms
    noun: str  # how errors name an entry
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (gradient, what was written in its stead)
    _sources: list[int] | None = None

    @property
    def sources(self) -> list[int]:
        """Per entry of the list: its gradient's place in the batches one after another, or -1 if it has none."""
        # Asked of the table only when wanted: making the list costs 15 ns per tensor, an eighth of a call.
        return self.reads[0].table.sources if self._sources is None else self._sources

    @property
    def device(self) -> torch.device:
        """Of the first gradient; results live there."""
        return self.reads[0].device if self.reads else torch.device("cpu")

    def has_duplicates(self) -> bool:
        """Whether two entries of the list share a gradient's memory."""
        return sum(place >= 0 for place in self.sources) > sum(len(batch.tensors) for batch in self.reads)

    def write_back(self, coef: Tensor | None = None) -> None:
        """Bring home what was written to the stand-ins of strided and uncoalesced gradients.

        `coef`: what they were scaled by; where the host can see that it is 1, nothing has been written.
        """
        unchanged = coef is not None and coef.device.type == "cpu" and bool((coef == 1).all()) if self.copies else True
        if not unchanged:
            with torch.no_grad():
                for gradient, written in self.copies:
                    gradient.copy_(written)

    def name(self, place: int) -> str:
        """How to call the gradient at this place of the batches."""
        return self.noun.format(self.sources.index(place))


def gather(items: list[Tensor], attribute: str = "grad", *, p: float | None = 2.0) -> Gradients:
    """The gradients of parameters, for an in-place write, and for a p-norm of them unless p is None.

    Raises TypeError or RuntimeError for what cannot be clipped, naming it; no gradient has been touched then.
    """
    noun = f"parameters[{{}}].{attribute}"
    grads = _collect_compiled(items, attribute, noun) or _collect(items, attribute, noun, p, writable=True)
    if not grads.reads:
        _explain_no_gradients(items, attribute)
    return grads


def gather_tensors(items: list[Tensor], *, p: float = 2.0) -> Gradients:
    """The tensors themselves, to be read only."""
    noun = "tensors[{}]"
    return _collect_compiled(items, None, noun) or _collect(items, None, noun, p, writable=False)


def mark_written(tensors: list[Tensor]) -> None:
    """Tell autograd: writes through a raw pointer don't bump the version counters by themselves."""
    torch.autograd.graph.increment_version(tensors)


def as_list(items: Iterable[Tensor] | Tensor, noun: str) -> list[Tensor]:
    """What a public function was given, which may be an iterator: once through it. A list is copied: asking its items
    for gradients may run code that changes it."""
    if type(items) is list:
        return items.copy()
    if isinstance(items, Tensor):
        return [items]
    try:
        iterator = iter(items)
    except TypeError:
        kind = type(items).__name__
        raise TypeError(f"{noun} must be a tensor or an iterable of tensors, got {kind}{_hint(items)}") from None
    listed = list(iterator)  # outside of the try: what a generator raises is its own affair
    if not listed and isinstance(items, types.GeneratorType) and noun == "parameters":
        warnings.warn(  # torch's words
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=user_stacklevel()
        )
    return listed


def _hint(given: Any) -> str:
    """The way out for what people pass by mistake."""
    if hasattr(given, "param_groups"):
        return "; pass the parameters of its param_groups"
    if isinstance(given, dict) and "params" in given:
        return "; pass its ['params']"
    if hasattr(given, "parameters"):
        return "; pass its .parameters()"
    return "; pass .parameters(), not .named_parameters()" if isinstance(given, tuple) else ""


def _collect_compiled(items: list[Any], attribute: str | None, noun: str) -> Gradients | None:
    """The ordinary case, or None: not built, nothing to clip, or a gradient that needs a closer look."""
    table = _extension.C.collect(items, attribute) if _extension.C is not None else None
    if not table:
        return None
    batch = [Batch(table.tensors, table.tensors[0].device, table)]
    return Gradients(batch, batch, torch.float64 if table.has_float64 else torch.float32, noun)


def _collect(items: list[Any], attribute: str | None, noun: str, p: float | None, *, writable: bool) -> Gradients:
    flats: dict[tuple[Any, ...], Flat] = {}
    keys: list[tuple[Any, ...] | None] = []
    for i, item in enumerate(items):
        gradient = _gradient_of(item, i, attribute, noun)
        key = None
        if gradient is not None:
            flat = flatten(gradient, noun.format(i), p, writable=writable)
            key = flat.memory if flat.memory is not None else (i,)
            flats.setdefault(key, flat)
        keys.append(key)
    return _grouped(flats, keys, noun)


def _gradient_of(item: Any, i: int, attribute: str | None, noun: str) -> Tensor | None:
    if not isinstance(item, Tensor):
        raise TypeError(f"{noun.partition('[')[0]}[{i}] is a {type(item).__name__}, not a tensor{_hint(item)}")
    if attribute == "grad":
        gradient = item.grad
    else:
        gradient = item if attribute is None else getattr(item, attribute, None)
    if gradient is not None and not isinstance(gradient, Tensor):
        raise TypeError(f"{noun.format(i)} is a {type(gradient).__name__}, not a tensor")
    return gradient


def _grouped(flats: dict[tuple[Any, ...], Flat], keys: list[tuple[Any, ...] | None], noun: str) -> Gradients:
    by_device: dict[torch.device, list[tuple[Any, ...]]] = {}
    for key, flat in flats.items():
        by_device.setdefault(flat.read.device, []).append(key)
    place = {key: n for n, key in enumerate(key for group in by_device.values() for key in group)}
    reads = [Batch([flats[key].read for key in group], device) for device, group in by_device.items()]
    same = all(flat.read is flat.write for flat in flats.values())
    writes = reads if same else [Batch([flats[k].write for k in group], device) for device, group in by_device.items()]
    double = any(flat.dtype == torch.float64 for flat in flats.values())
    return Gradients(
        reads,
        writes,
        dtype=torch.float64 if double else torch.float32,
        noun=noun,
        copies=[flat.copy for flat in flats.values() if flat.copy is not None],
        _sources=[-1 if key is None else place[key] for key in keys],
    )


def _explain_no_gradients(parameters: list[Any], attribute: str) -> None:
    """No gradient anywhere is legal, unless the caller plainly meant something else."""
    if not parameters:
        return
    if all(type(p) is Tensor and not p.requires_grad for p in parameters):
        raise TypeError(
            f"none of the {len(parameters)} entries of parameters is a Parameter, requires grad or has .{attribute}: "
            "these look like gradients. Pass the parameters that hold them (get_total_norm takes gradients)"
        )
    if not any(hasattr(p, attribute) for p in parameters):
        raise AttributeError(f"no parameter has an attribute {attribute!r}, which grad_attr names")
