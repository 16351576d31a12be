"""Sharded gradients (DTensors): over which ranks the norm of each has to be taken. Only placements are looked at here.

A DTensor lies on a mesh of ranks. Along a mesh dimension its ranks hold different shards (`Shard`, `_StridedShard`),
the same elements (`Replicate`), or parts of a sum (`Partial`). Its reduce set are the ranks along all dimensions that
shard it. Where another gradient of the same mesh is sharded along more dimensions, the larger set serves both: each of
the ranks that hold the same elements then contributes its part of them, so that one all-reduce does.

All of this follows from the parameters' placements, which every rank of a mesh sees alike, and never from which
gradients this rank happens to have.
"""

import atexit
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

from .. import _extension
from ..torch_internals import TorchOnly, as_torch, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HERE = -1  # the member number of what every rank counts by itself


@dataclass(eq=False)
class ReduceSet:
    """Ranks that hold shards, or parts of a sum, of the same gradients."""

    mesh: "DeviceMesh"
    dims: tuple[int, ...]
    ranks: tuple[int, ...]  # in the numbers of the whole world
    group: Any = None  # their process group, once it is needed (process_groups.py)
    flat_mesh: Any = None  # the mesh of this group alone, once it is needed


class Share(NamedTuple):
    """Entries of the list whose gradients are counted alike."""

    member: int  # which of the plan's sets, or HERE
    replicas: int  # ranks of that set that hold the same elements
    entries: list[int]


class PartialSum(NamedTuple):
    """How a gradient of which each rank holds a part of the sum becomes one."""

    over: ReduceSet
    divisor: int


@dataclass(eq=False)
class Plan:
    """What a list of placements asks for. Made once, and found again as long as the placements are the same objects."""

    specs: list[Any]  # per entry, None for what is no DTensor
    sets: list[ReduceSet]  # in the order of their ranks, which is the same for all ranks: none can wait for another
    shares: list[Share]
    partials: dict[int, PartialSum]  # by entry
    is_double: bool
    mesh: "DeviceMesh"  # of the first DTensor
    first: int  # the entry that is the first DTensor
    kinds: list[int]  # per entry, of its global shape and what it is sharded along; 0 for what is no DTensor
    world: Callable[[], Any]  # the default process group that it was made under, if that still exists
    separate: "WeakSet[Any]" = field(default_factory=WeakSet)  # process groups known to share no set's ranks

    @property
    def is_local(self) -> bool:
        """Whether it takes no other rank to tell the norm."""
        return not self.sets and not self.partials

    @cached_property
    def members(self) -> list[list[int]]:
        """Of each set, the entries that are counted in it, share after share."""
        return [
            [entry for share in self.shares if share.member == number for entry in share.entries]
            for number in range(len(self.sets))
        ]

    def count(self, number: int) -> str:
        """How many entries are counted in a set, in words."""
        return f"{len(self.members[number])} sharded parameters"

    @cached_property
    def in_order(self) -> list[int]:
        """Of each set, a number that tells which gradients its entries are, and in which order."""
        return [zlib.crc32(repr([self.kinds[entry] for entry in own]).encode()) for own in self.members]

    @cached_property
    def in_any_order(self) -> list[int]:
        """The same whatever their order."""
        return [sum(self.kinds[entry] for entry in own) for own in self.members]

    def contents(self, number: int, scopes: Sequence[Sequence[int]] | None) -> Any:
        """What tells which gradients of a set each scope has, in whatever order, and how many."""
        if scopes is None:
            return self.in_any_order[number]
        own = set(self.members[number])
        kinds = [[self.kinds[entry] for entry in scope if entry in own] for scope in scopes]
        return tuple((len(scope), sum(scope)) for scope in kinds)


@dataclass(eq=False, slots=True)
class Shards:
    """The DTensors among the gradients of one call."""

    plan: Plan
    dtensors: list[Tensor | None]  # per entry
    device: torch.device  # that all ranks agree on: the first parameter's, whether or not it has a gradient

    def partial(self) -> int | None:
        """The first entry of which this rank holds a part of a sum."""
        return next((entry for entry in self.plan.partials if self.dtensors[entry] is not None), None)


def shards_of(items: list[Any], specs: list[Any], dtensors: list[Tensor | None]) -> Shards:
    """`specs`, `dtensors`: per item the placement and the gradient, as the sweep notes them."""
    plan = _plan(specs)
    return Shards(plan, dtensors, items[plan.first].device)


def note(items: list[Any], attribute: str | None) -> tuple[list[Any], list[Tensor | None]] | None:
    """What the compiled sweep notes, or None if there is no DTensor."""
    specs: list[Any] = [None] * len(items)
    dtensors: list[Tensor | None] = [None] * len(items)
    for i, item in enumerate(items):
        gradient = item if attribute is None else getattr(item, attribute, None)
        if isinstance(gradient, Tensor) and is_dtensor(gradient):
            specs[i], dtensors[i] = gradient._spec, gradient  # type: ignore[attr-defined]
        elif gradient is None and is_dtensor(item):
            specs[i] = item._spec
    return None if all(spec is None for spec in specs) else (specs, dtensors)


def local_of(gradient: Tensor) -> Tensor:
    """This rank's shard of a DTensor; anything else as it is."""
    if not is_dtensor(gradient):
        return gradient
    with torch.no_grad():
        local: Tensor = gradient.to_local()  # type: ignore[attr-defined]
    # What an asynchronous collective is yet to fill: waited for where it is still wrapped.
    return local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local  # type: ignore[attr-defined]


_plans: list[Plan] = []  # the last ones, newest first
atexit.register(_plans.clear)  # process groups want to be freed before the interpreter is


def _plan(specs: list[Any]) -> Plan:
    same = _extension.C.same_objects if _extension.C is not None else _same_objects
    for plan in _plans:
        if same(plan.specs, specs):  # which plan.specs keeps alive, so that no other can have the place of one
            return plan
    plan = _Planner(specs).plan()
    world = plan.world()  # plans of one that was destroyed would keep its groups, through their meshes
    _plans[:] = [plan, *(other for other in _plans if other.world() is world)][:8]
    return plan


def _world() -> Callable[[], Any]:
    from torch import distributed

    world = distributed.group.WORLD
    return (lambda: None) if world is None else ref(world)


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


@dataclass
class _Planner:
    specs: list[Any]
    dims: dict["DeviceMesh", set[tuple[int, ...]]] = field(default_factory=dict)  # of each mesh, what is sharded along
    partials: dict[int, PartialSum] = field(default_factory=dict)
    sums: dict[tuple["DeviceMesh", tuple[int, ...]], ReduceSet] = field(default_factory=dict)
    codes: dict[Any, int] = field(default_factory=dict)

    def plan(self) -> Plan:
        sharded = [None if spec is None else self._look(entry, spec) for entry, spec in enumerate(self.specs)]
        largest = {mesh: _largest(dims) for mesh, dims in self.dims.items()}
        by_ranks: dict[tuple[int, ...], ReduceSet] = {}
        for mesh, several in largest.items():
            for dims in several:
                ranks = ranks_along(mesh, dims)
                by_ranks.setdefault(ranks, ReduceSet(mesh, dims, ranks))
        sets = [by_ranks[ranks] for ranks in sorted(by_ranks)]
        place = {one.ranks: number for number, one in enumerate(sets)}
        known: dict[Any, tuple[int, int]] = {}
        shares: dict[tuple[int, int], list[int]] = {}
        for entry, (spec, own) in enumerate(zip(self.specs, sharded, strict=True)):
            key = None if own is None else (spec.mesh, own)
            if key not in known:
                known[key] = (HERE, 1) if own is None else _membership(spec.mesh, own, largest[spec.mesh], place)
            shares.setdefault(known[key], []).append(entry)
        first = next(entry for entry, spec in enumerate(self.specs) if spec is not None)
        is_double = any(map(is_double_spec, self.specs))
        ordered = [Share(*key, entries) for key, entries in sorted(shares.items())]
        kinds = [0 if own is None else self._kind(spec, own) for spec, own in zip(self.specs, sharded, strict=True)]
        mesh = self.specs[first].mesh
        return Plan(self.specs, sets, ordered, self.partials, is_double, mesh, first, kinds, _world())

    def _kind(self, spec: Any, own: tuple[int, ...]) -> int:
        key = (None if spec.tensor_meta is None else tuple(spec.tensor_meta.shape), own)
        if key not in self.codes:
            self.codes[key] = zlib.crc32(repr(key).encode())
        return self.codes[key]

    def _look(self, entry: int, spec: Any) -> tuple[int, ...]:
        """The mesh dimensions along which it is sharded; those of size 1 shard nothing."""
        sharded: list[int] = []
        partial: list[int] = []
        for dim, placement in enumerate(spec.placements):
            if spec.mesh.size(dim) == 1 or placement.is_replicate():
                continue
            (partial if placement.is_partial() else sharded).append(dim)
        if partial:
            self.partials[entry] = self._sum(spec, tuple(partial))
        dims = tuple(sharded)
        self.dims.setdefault(spec.mesh, set()).add(dims)
        return dims

    def _sum(self, spec: Any, dims: tuple[int, ...]) -> PartialSum:
        from torch.distributed.tensor import Partial

        # A subclass may mean another sum: that of the parts' squares where the DTensor is a norm.
        partial = [spec.placements[dim] for dim in dims]
        if not all(type(placement) is Partial and placement.reduce_op in ("sum", "avg") for placement in partial):
            raise (TorchOnly if as_torch.get() else TypeError)(
                f"a DTensor gradient is {spec.placements}; of partial gradients only sums and averages can be clipped: "
                ".redistribute() it first, or pass its .full_tensor()"
            )
        key = (spec.mesh, dims)
        if key not in self.sums:
            self.sums[key] = ReduceSet(*key, ranks_along(*key))
        averaged = [dim for dim in dims if str(spec.placements[dim].reduce_op) == "avg"]
        return PartialSum(self.sums[key], math.prod(spec.mesh.size(dim) for dim in averaged))


def _largest(several: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that are in no other one."""
    return [dims for dims in sorted(several) if dims and not any(set(dims) < set(other) for other in several)]


def _membership(
    mesh: "DeviceMesh", own: tuple[int, ...], largest: Sequence[tuple[int, ...]], place: dict[tuple[int, ...], int]
) -> tuple[int, int]:
    """Which set what is sharded along these dimensions is counted in, and how many of its ranks hold the same."""
    for dims in largest:
        if set(own) <= set(dims):
            return place[ranks_along(mesh, dims)], math.prod(mesh.size(dim) for dim in dims if dim not in own)
    return HERE, 1


def ranks_along(mesh: "DeviceMesh", dims: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks that differ from this one in these coordinates at most."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"a DTensor gradient is on {mesh}, which this rank does not belong to")
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return tuple(mesh.mesh[index].flatten().tolist())


def is_double_spec(spec: Any) -> bool:
    """Whether the DTensor is made of fp64 numbers."""
    return (
        spec is not None
        and spec.tensor_meta is not None
        and spec.tensor_meta.dtype in (torch.float64, torch.complex128)
    )
