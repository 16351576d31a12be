"""A list of parameters (or of tensors) to batches, a device each, ready to be read and written.

With the extension one compiled sweep takes what it knows and asks a survey for the rest; without it the survey sees
every entry.
"""

from array import array
from bisect import bisect_left
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension
from ..arguments import explain_no_gradients
from ..peers import Peers
from .batch import Batch
from .layouts import Flat, memory_of
from .shards import Shards, is_double_spec, note, shards_of
from .survey import Survey, is_double, name_of

if _extension.C is not None:
    _extension.C.bind_survey(Survey)


class _Found(NamedTuple):
    sources: list[int]

    @property
    def packed_sources(self) -> bytearray | None:
        return bytearray(array("q", self.sources))

    def source(self, item: int) -> int:
        return self.sources[item]


class Write(NamedTuple):
    """What is written of one batch: each stretch of memory once."""

    batch: Batch
    read_count: int  # tensors in the batch that is read
    places: list[int] | None  # of its tensors in that batch; None: the same tensors
    twins: Sequence[tuple[Tensor, int]] = ()  # what lies in the memory of one of them (which) and is written with it

    def number_of(self, place: int) -> int | None:
        """Among the tensors that are written, of the one at this place of the batch; None if it is not written."""
        if self.places is None:
            return place if 0 <= place < self.read_count else None
        number = bisect_left(self.places, place)  # they ascend
        return number if self.places[number : number + 1] == [place] else None


@dataclass(eq=False)
class Gradients:
    """The gradients behind a list, on one device or several."""

    reads: list[Batch]  # what the norm is taken of, in the order of the list
    found: Any  # _Found, or what the sweep gave
    attribute: str | None
    is_double: bool  # any gradient is fp64 (or complex128)
    flats: dict[int, Flat] = field(default_factory=dict)  # by place: those that could not be taken as they are
    repeated: set[int] = field(default_factory=set)  # places in the memory of an earlier one: written with that one
    is_written: bool = False
    shards: Shards | None = None  # if any of them is a DTensor
    groups: Sequence[Any] = ()  # process groups whose ranks hold others
    uncounted: Sequence[int] = ()  # entries of the list that one of those ranks counts
    _sources: list[int] | None = None
    _writes: list[Write] | None = None

    @property
    def sources(self) -> list[int]:
        """Per entry of the list: its place in the batches one after another, or -1 if it has no gradient."""
        # Asked for only when wanted: making the list of the sweep's takes 15 ns per tensor, an eighth of a call.
        if self._sources is None:
            self._sources = self.found.sources
        return self._sources

    @property
    def packed_sources(self) -> bytearray | None:
        """The same, int64 each; None where every entry has the next place."""
        packed: bytearray | None = self.found.packed_sources
        return packed

    @property
    def each_is_local(self) -> bool:
        """Whether this rank can tell the norm of each by itself."""
        return self.shards is None or self.shards.plan.is_local

    @property
    def is_local(self) -> bool:
        """And that of all together, as no other rank holds any."""
        return not self.groups and self.each_is_local

    @property
    def dtype(self) -> torch.dtype:
        """Of norms."""
        return torch.float64 if self.is_double else torch.float32

    def dtype_of(self, entries: Collection[int]) -> torch.dtype:
        """Of the norm of those of some entries."""
        if not self.is_double:
            return torch.float32
        if self.shards is not None and any(is_double_spec(self.shards.plan.specs[entry]) for entry in entries):
            return torch.float64
        places = {self.sources[entry] for entry in entries}
        made_of = (
            (self.flats[place].write if place in self.flats else tensor).dtype
            for place, tensor in enumerate(self.tensors())
            if place in places
        )
        return torch.float64 if torch.float64 in made_of else torch.float32

    @property
    def device(self) -> torch.device:
        """Of the first gradient; results live there."""
        if self.reads:
            return self.reads[0].device
        return torch.device("cpu") if self.shards is None else self.shards.device

    def __len__(self) -> int:
        return sum(len(batch.tensors) for batch in self.reads)

    def name(self, place: int) -> str:
        """How errors call the gradient at this place of the batches."""
        return name_of(self.attribute, self.sources.index(place))

    def tensors(self) -> Iterator[Tensor]:
        """What is read, in the order of places."""
        return chain.from_iterable(batch.tensors for batch in self.reads)

    def dtensors(self, write: Write, first: int, written: bool | list[bool]) -> list[Tensor]:
        """Those whose local tensors were written with this batch."""
        if self.shards is None:
            return []
        if isinstance(written, bool) and len(self.reads) == 1:
            return [dtensor for dtensor in self.shards.dtensors if dtensor is not None]
        places = write.places or range(write.read_count)
        if not isinstance(written, bool):
            places = [place for place, changed in zip(places, written, strict=True) if changed]
        mine = {first + place for place in places} | self.repeated
        return [
            d for place, d in zip(self.sources, self.shards.dtensors, strict=True) if d is not None and place in mine
        ]

    def first_places(self) -> Iterator[int]:
        """Of each batch, the place of its first tensor."""
        first = 0
        for batch in self.reads:
            yield first
            first += len(batch.tensors)

    @property
    def writes(self) -> list[Write]:
        """One per batch that is read."""
        # Not a cached_property, whose lock takes 1 us where the caches are full of gradients.
        if self._writes is None:
            if not self.repeated and all(flat.read is flat.write for flat in self.flats.values()):
                self._writes = [Write(batch, len(batch.tensors), None) for batch in self.reads]
            else:
                self._writes = list(map(self._write_of, self.reads, self.first_places()))
        return self._writes

    def _write_of(self, batch: Batch, first: int) -> Write:
        tensors: dict[int, Tensor] = {}
        twins: list[tuple[Tensor, int]] = []
        seen: dict[Hashable, int] = {}
        for place, tensor in enumerate(batch.tensors):
            flat = self.flats.get(first + place)
            written = tensor if flat is None else flat.write
            memory = memory_of(written)
            if memory in seen:
                twins.append((written, seen[memory]))
                continue
            if memory is not None:
                seen[memory] = len(tensors)
            tensors[place] = written
        return Write(Batch(list(tensors.values()), batch.device), len(batch.tensors), list(tensors), twins)

    def bring_home(self, write: Write, first: int, written: bool | list[bool]) -> None:
        """What was written to stand-ins of this batch: all of it, or where that is known to have changed."""
        if not self.flats:
            return
        for place, flat in self.flats.items():
            number = write.number_of(place - first)
            if flat.home is not None and number is not None and (isinstance(written, bool) or written[number]):
                flat.bring_home()


def gather(
    items: list[Tensor], attribute: str | None = "grad", *, p: float | None = 2.0, peers: Peers | None = None
) -> Gradients:
    """The gradients of parameters, for an in-place write, or the items themselves (None), to be read only.

    `p`: of the norm that is wanted of them; None if none is. Raises TypeError, ValueError or RuntimeError for what
    cannot be clipped, naming it; no gradient has been touched then.
    """
    uncounted = () if peers is None else peers.uncounted(items)
    if _extension.C is not None:
        grads = from_sweep(items, _extension.C.gather(items, attribute, p), attribute)
    else:
        grads = _survey_all(items, attribute, p)
    if peers is not None:
        grads.groups, grads.uncounted = peers.groups, uncounted
    return grads


def gather_given(
    parameters: list[Tensor], attribute: str, *, p: float | None = 2.0, peers: Peers | None = None
) -> Gradients:
    """The same of parameters that a caller named, who is told if they plainly are not what was meant."""
    grads = gather(parameters, attribute, p=p, peers=peers)
    if not grads.reads:
        explain_no_gradients(parameters, attribute)
    return grads


def from_sweep(items: list[Tensor], gathered: Any, attribute: str | None) -> Gradients:
    """What the compiled sweep found."""
    tables, batches, is_double = gathered.lists, [], False
    for table in tables:
        tensors = table.tensors
        batches.append(Batch(tensors, tensors[0].device, table))
        is_double |= table.has_float64
    grads = Gradients(batches, gathered, attribute, is_double)
    for table, first in zip(tables, grads.first_places(), strict=True):
        if table.repeated:
            grads.repeated.update(first + place for place in table.repeated)
    if gathered.survey is not None:
        _add_surveyed(grads, gathered.survey)
    if gathered.specs is not None:
        _add_shards(grads, shards_of(items, gathered.specs, gathered.dtensors))
    return grads


def _survey_all(items: list[Any], attribute: str | None, p: float | None) -> Gradients:
    survey = Survey(attribute, p)
    found = [survey.look(i, item) for i, item in enumerate(items.copy())]  # looking may run code that changes the list
    by_device: dict[torch.device, list[int]] = {}
    for i, read in enumerate(found):
        if isinstance(read, Tensor):
            by_device.setdefault(read.device, []).append(i)
    batches = [Batch([survey.flats[i].read for i in group], device) for device, group in by_device.items()]
    place = {i: n for n, i in enumerate(i for group in by_device.values() for i in group)}
    sources = [-1 if read is None else place[i if isinstance(read, Tensor) else read] for i, read in enumerate(found)]
    grads = Gradients(batches, _Found(sources), attribute, is_double=False)
    _add_surveyed(grads, survey)
    memories = [memory_of(grads.flats[n].write) for n in range(len(grads))]
    first = {memory: n for n, memory in reversed(list(enumerate(memories)))}
    grads.repeated = {n for n, memory in enumerate(memories) if memory is not None and first[memory] != n}
    noted = note(items, attribute)
    if noted is not None:
        _add_shards(grads, shards_of(items, *noted))
    return grads


def _add_shards(grads: Gradients, shards: Shards) -> None:
    grads.shards = shards
    grads.is_double |= shards.plan.is_double


def _add_surveyed(grads: Gradients, survey: Survey) -> None:
    for i, flat in survey.flats.items():
        grads.flats[grads.found.source(i)] = flat
        grads.is_double |= is_double(flat)
