"""The process groups of reduce sets: found, made, and found again where a world has been destroyed."""

import atexit
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .gradients.shards import ReduceSet, Shards

_made: dict[tuple[int, ...], ProcessGroup] = {}
atexit.register(_made.clear)  # process groups want to be freed before the interpreter is


def group_of(one: ReduceSet) -> ProcessGroup:
    """The process group of a reduce set, which is created when it is first needed and there is none."""
    if one.group is None or not _is_alive(one.group):
        one.group, one.flat_mesh = _find_group(one), None
    return one.group  # type: ignore[no-any-return]


def _find_group(one: ReduceSet) -> ProcessGroup:
    if len(one.dims) == 1:
        return one.mesh.get_group(one.dims[0])
    ranks = tuple(sorted(one.ranks))
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    for others in [others for others, group in _made.items() if not _is_alive(group)]:
        del _made[others]  # whose threads and sockets would live on
    if ranks not in _made:
        # Only its members take part, those of all such sets in the order of their ranks: no two can wait in a circle.
        _made[ranks] = dist.new_group(list(ranks), timeout=_timeout(one.mesh), use_local_synchronization=True)
    return _made[ranks]


def _timeout(mesh: DeviceMesh) -> timedelta | None:
    """The whole world's, which new groups do not take over; None, the backend's own, where it does not tell."""
    try:
        backend = dist.group.WORLD._get_backend(torch.device(mesh.device_type))  # type: ignore[union-attr]
        return backend.options._timeout
    except (AttributeError, RuntimeError):
        return None


def _is_alive(group: ProcessGroup) -> bool:
    try:
        return dist.get_rank(group) >= 0
    except (KeyError, ValueError, RuntimeError):  # the world that it was made in has been destroyed
        return False


def refuse_groups_within_sets(shards: Shards | None, groups: Iterable[ProcessGroup]) -> None:
    """What a set of ranks has summed, a group of several of them would count again for each. (A maximum it leaves.)"""
    if shards is None or not shards.plan.sets:
        return
    for group in groups:
        if group in shards.plan.separate:
            continue
        ranks = dist.get_process_group_ranks(group)
        for one in shards.plan.sets:
            both = sorted(set(ranks).intersection(one.ranks))
            if len(both) > 1:
                raise ValueError(
                    f"group= names a process group of the ranks {ranks}, over {both} of which the norm of the DTensors "
                    f"on {one.mesh} is taken anyway: it would be counted {len(both)} times. Leave that group out; "
                    "group= is for ranks that hold other gradients. No gradient has been changed"
                )
        shards.plan.separate.add(group)
