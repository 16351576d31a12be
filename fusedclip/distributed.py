"""The one file that communicates: the lifted values of this rank to those of all ranks.

Collectives run one after another in an order that all ranks share: sums of partial gradients, the reduce sets of the
plan in the order of their ranks, then the groups that the caller named.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import DeviceMesh

from . import norms
from .gradients import Batch, Gradients
from .gradients.layouts import flatten
from .gradients.shards import HERE, Plan, Shards, Share, local_of
from .process_groups import group_of, refuse_groups_within_sets
from .torch_internals import as_torch
from .transfers import index_on


def totals(lifted: Tensor, p: float, grads: Gradients, scopes: Sequence[Sequence[int]] | None, label: str) -> Tensor:
    """The lifted values [U] of the gradients of this rank to those of scopes over all ranks, [S].

    `scopes`: the entries of each, None for one of all. `label`: what other ranks have to call them, too.

    Every rank must call it, those without a gradient included.
    """
    shards, sources = grads.shards, grads.sources
    if not math.isinf(p):
        refuse_groups_within_sets(shards, grads.groups)
    if shards is None:
        wholes = _wholes(lifted, p, sources, scopes)
    elif p == 0 and shards.plan.sets:  # counts tensors; whether one has an element that is not 0, all its ranks decide
        each = _each_over_sets(_each_once(lifted, p, sources), p, shards, label, scopes)
        wholes = _wholes(each, p, range(len(each)), scopes)
    else:
        wholes = _over_sets(lifted, p, sources, shards, scopes, label)
    for group in grads.groups:
        wholes = merge_ranks(wholes, p, group, _home(grads), label)
    return _of_any(wholes, p)


def each_over_ranks(lifted: Tensor, p: float, grads: Gradients) -> Tensor:
    """The lifted value of each entry of the list over the ranks that hold its shards, that of norm 0 for none."""
    each = _spread(_marked(lifted, p), p, grads.sources)
    return _of_any(each if grads.shards is None else _each_over_sets(each, p, grads.shards, "of each tensor"), p)


def _spread(lifted: Tensor, p: float, sources: Sequence[int]) -> Tensor:
    """[..., U] to [..., T], the identity for none."""
    return norms.spread(lifted, index_on(sources, lifted.device), norms.identity(p))


def _each_once(lifted: Tensor, p: float, sources: Sequence[int]) -> Tensor:
    """The same, of entries with the same gradient only the first has it.

    (Not to be asked of values over all ranks: an empty shard has no memory that would tell.)
    """
    each = _spread(lifted, p, sources)
    first = {place: entry for entry, place in reversed(list(enumerate(sources)))}
    again = [entry for entry, place in enumerate(sources) if place >= 0 and first[place] != entry]
    each[index_on(again, each.device)] = norms.identity(p)
    return each


def _each_over_sets(
    each: Tensor, p: float, shards: Shards, label: str, scopes: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Lifted values of each entry, [..., T], over the ranks of its reduce set; written in place."""
    plan = shards.plan
    for number, one in enumerate(plan.sets):
        shares = [share for share in plan.shares if share.member == number]
        indices = [index_on(share.entries, each.device) for share in shares]
        parts = [_part(each[..., index], p, share.replicas) for index, share in zip(indices, shares, strict=True)]
        contents = (plan.in_order[number], scopes and plan.contents(number, scopes))
        label_of_set = f"{label} {plan.count(number)}"
        merged = merge_ranks(torch.cat(parts, -1), p, group_of(one), shards.device, label_of_set, contents)
        each[..., torch.cat(indices)] = merged
    return each


def stats_over_ranks(
    counted: Tensor, by_entry: Tensor, grads: Gradients, groups: Sequence[ProcessGroup]
) -> tuple[Tensor, Tensor]:
    """Lifted statistics of this rank to those over all ranks: of each entry, [5, T], and of all together, [5].

    `counted`: of this rank's gradients, [5, U], without those that another rank counts. `by_entry`: of all, [5, T].
    """
    by_entry, shards = by_entry.clone(), grads.shards
    refuse_groups_within_sets(shards, groups)
    wholes = [norms.combine_stats(counted)] if shards is None else _stats_over_sets(counted, by_entry, grads, shards)
    total = norms.combine_stats(torch.stack(wholes, 1))
    for group in groups:
        total = merge_stats(total, group, _home(grads), "statistics")
    return by_entry, total


def _stats_over_sets(counted: Tensor, by_entry: Tensor, grads: Gradients, shards: Shards) -> list[Tensor]:
    """Those of each share, [5]; those of its entries take their places in `by_entry`.

    One SUM and one MAX per reduce set: of its entries, and of all of them together, in which a gradient listed twice
    counts once.
    """
    own = [_whole_share(counted, share, grads.sources) for share in shards.plan.shares]
    wholes = [whole for whole, share in zip(own, shards.plan.shares, strict=True) if share.member == HERE]
    for number, one in enumerate(shards.plan.sets):
        members = [n for n, share in enumerate(shards.plan.shares) if share.member == number]
        shares = [shards.plan.shares[n] for n in members]
        indices = [index_on(share.entries, by_entry.device) for share in shares]
        columns = [torch.cat([by_entry[:, i], own[n][:, None]], 1) for i, n in zip(indices, members, strict=True)]
        parts = torch.cat([_part_of_stats(c, share) for c, share in zip(columns, shares, strict=True)], 1)
        label = f"statistics of {shards.plan.count(number)}"
        merged = merge_stats(parts, group_of(one), shards.device, label, shards.plan.in_order[number])
        for index, part in zip(indices, torch.split(merged, [len(i) + 1 for i in indices], 1), strict=True):
            by_entry[:, index] = part[:, :-1]
            wholes.append(part[:, -1])
    return wholes


def _whole_share(lifted: Tensor, share: Share, sources: Sequence[int]) -> Tensor:
    places = sorted({sources[entry] for entry in share.entries} - {-1})
    return norms.combine_stats(lifted[:, index_on(places, lifted.device)])


def _part_of_stats(lifted: Tensor, share: Share) -> Tensor:
    sums, largest = lifted[: norms.LARGEST], lifted[norms.LARGEST :]
    return torch.cat([_part(sums, 1.0, share.replicas), _part(largest, math.inf, share.replicas)])


def merge_stats(
    lifted: Tensor, group: ProcessGroup, home: torch.device | None, label: str, contents: object = None
) -> Tensor:
    """Lifted statistics, [5, ...], over all ranks of `group`: one SUM and one MAX, in which every rank takes part."""
    sums = merge_ranks(lifted[: norms.LARGEST], 1.0, group, home, label, contents)
    return torch.cat([sums, merge_ranks(lifted[norms.LARGEST :], math.inf, group, home, label, contents)])


def _over_sets(
    lifted: Tensor,
    p: float,
    sources: Sequence[int],
    shards: Shards,
    scopes: Sequence[Sequence[int]] | None,
    label: str,
) -> Tensor:
    plan = shards.plan
    sums: dict[int, list[Tensor]] = {}
    for share in plan.shares:
        own = [share.entries] if scopes is None else _meet(share.entries, scopes)
        everything = scopes is None and len(plan.shares) == 1
        wholes = _wholes(lifted, p, sources, None if everything else own)
        sums.setdefault(share.member, []).append(_part(wholes, p, share.replicas))
    merged = {member: reduce(norms.merger(p), parts) for member, parts in sums.items()}
    for number, one in enumerate(plan.sets):
        label_of_set, contents = f"{label}{plan.count(number)}", plan.contents(number, scopes)
        merged[number] = merge_ranks(merged[number], p, group_of(one), shards.device, label_of_set, contents)
    return reduce(norms.merger(p), (merged[member] for member in sorted(merged)))


def _meet(entries: Sequence[int], scopes: Sequence[Sequence[int]]) -> list[list[int]]:
    own = set(entries)
    return [[entry for entry in scope if entry in own] for scope in scopes]


def _part(lifted: Tensor, p: float, replicas: int) -> Tensor:
    """What one of several ranks with the same elements contributes. (Not all of it from one: the NaN of any shows.)"""
    return lifted if replicas == 1 or math.isinf(p) else lifted / replicas


def _wholes(lifted: Tensor, p: float, sources: Sequence[int], scopes: Sequence[Sequence[int]] | None) -> Tensor:
    """[S], for p < 0 [2, S] as of `_marked`."""
    if scopes is None:
        several = [_marked(lifted, p)]
    else:
        places = [sorted({sources[entry] for entry in entries} - {-1}) for entries in scopes]
        several = [_marked(norms.select(lifted, own), p) for own in places]
    wholes = [[norms.whole(row, p) for row in (one if p < 0 else [one])] for one in several]
    return torch.stack([torch.stack(row) for row in zip(*wholes, strict=True)]).view(*several[0].shape[:-1], -1)


def _marked(lifted: Tensor, p: float) -> Tensor:
    """Lifted values as they are; for p < 0 beside those of one element for each, [2, ...].

    Of no gradients at all the norm is 0, but a negative order's lifted value is that of a norm of inf.
    """
    return lifted if p >= 0 else torch.stack([lifted, torch.full_like(lifted, 0.0 if math.isinf(p) else 1.0)])


def _of_any(lifted: Tensor, p: float) -> Tensor:
    """The lifted values of what has been marked, over all ranks: those of norm 0 where there is no gradient."""
    if p >= 0:
        return lifted
    return torch.where(lifted[1] == norms.identity(p), 0.0 if math.isinf(p) else math.inf, lifted[0])


def merge_ranks(
    lifted: Tensor,
    p: float,
    group: ProcessGroup,
    home: torch.device | None = None,
    label: str = "",
    contents: object = None,
) -> Tensor:
    """Lifted values (fp64, any shape) over all ranks of `group`, the same on each of them.

    One all-reduce, of one or two fp64 numbers for each, from the device `home` if the group can. Every rank must call
    it, those without a gradient included. Ranks that want different things (orders, numbers of values, labels,
    `contents`: numbers that tell which gradients each value is of) get an error on the CPU, and NaN on a device, which
    is not waited for; never a number that is wrong.
    """
    is_extreme = math.isinf(p)
    values = _extreme(lifted, p) if is_extreme else lifted
    code = _code(p, lifted.shape, label, contents)
    n = 1 if is_extreme else group.size()
    own = (code, -code if is_extreme else code * code)
    packed = torch.cat([values.reshape(-1), _numbers(own, values.device)])
    packed = _all_reduce(packed, "max" if is_extreme else "sum", group, home or lifted.device).to(lifted.device)
    expected = (n * own[0], n * own[1])
    if packed.device.type != "cpu":
        agrees = (packed[-2:] == _numbers(expected, packed.device)).all()
        packed = torch.where(agrees, packed, math.nan)
    elif packed[-2:].tolist() != list(expected):
        raise RuntimeError(
            f"the ranks of a process group of {group.size()} ask for different norms: here of order {p}, "
            f"{lifted.numel()} of them{label and f' ({label})'}. Every rank must make the same call, with the same "
            "norm_type, the same scopes in the same order and the same sharded parameters in each (where each gradient "
            "has a norm of its own also in the same order), those without a gradient included. No gradient has been "
            "changed"
        )
    values = packed[:-2].view(values.shape)
    return torch.where(values[1] > 0, math.nan, values[0] * math.copysign(1, p)) if is_extreme else values


@lru_cache(maxsize=64)
def _code(p: float, shape: torch.Size, label: str, contents: object) -> int:
    """What ranks have to agree on, in a number whose square adds up over all of them without rounding."""
    return zlib.crc32(f"{p} {tuple(shape)} {label} {contents}".encode()) & 0xFFFF


@lru_cache(maxsize=64)
def _numbers(numbers: tuple[int, int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _all_reduce(values: Tensor, operation: str, group: ProcessGroup, home: torch.device) -> Tensor:
    """In place, but for functional ones and what has to be sent to another device."""
    values = values.to(_device_for(home, group))
    if as_torch.get():
        from torch.distributed import _functional_collectives as functional

        reduced: Tensor = functional.wait_tensor(functional.all_reduce(values, operation, group))  # type: ignore[no-untyped-call]
        return reduced
    dist.all_reduce(values, ReduceOp.SUM if operation == "sum" else ReduceOp.MAX, group)
    return values


def _extreme(lifted: Tensor, p: float) -> Tensor:
    """(value to take the maximum of, whether there is a NaN).

    gloo's and NCCL's MAX lose NaN, hence the second; a minimum is the negated maximum of the negated values.
    """
    value = torch.where(lifted.isnan(), -math.inf, lifted * math.copysign(1, p))
    return torch.stack([value, lifted.isnan().to(value.dtype)])


def _device_for(device: torch.device, group: ProcessGroup) -> torch.device:
    """`device`, or one that the group's backend can communicate from: NCCL knows no CPU, gloo beside it does."""
    kinds = [d.type for d in group._device_types]
    return device if device.type in kinds or not kinds else torch.device(kinds[0])


def _home(grads: Gradients) -> torch.device | None:
    """That all ranks know: where gradients are may differ, as some have none."""
    return None if grads.shards is None else grads.shards.device


def sum_partials(grads: Gradients, p: float) -> list[Batch]:
    """What is read of gradients of which this rank holds one part of the sum: the whole sum. Others as they are.

    One all-reduce per set of ranks and dtype, of as many bytes as these gradients have (16-bit ones in fp32).
    """
    assert grads.shards is not None
    together: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for entry, partial in grads.shards.plan.partials.items():
        dtensor = grads.shards.dtensors[entry]
        if dtensor is not None:
            together.setdefault((partial.over.ranks, str(dtensor.dtype)), []).append(entry)
    sums: dict[int, Tensor] = {}
    for _, entries in sorted(together.items()):
        sums.update(_sums(grads.shards, entries))
    read = dict(enumerate(grads.tensors()))
    for entry, total in sums.items():
        place = grads.sources[entry]
        read[place] = flatten(total, grads.name(place), p, writable=False).read
    firsts = grads.first_places()
    return [
        Batch([read[first + i] for i in range(len(batch.tensors))], batch.device)
        for batch, first in zip(grads.reads, firsts, strict=True)
    ]


def _sums(shards: Shards, entries: Iterable[int]) -> dict[int, Tensor]:
    """The sums of gradients of one dtype, by entry, over one set of ranks."""
    entries = list(entries)
    partials = [shards.plan.partials[entry] for entry in entries]
    parts = [_wide(local_of(shards.dtensors[entry])) for entry in entries]  # type: ignore[arg-type]
    flat = torch.cat([(part / partial.divisor).flatten() for part, partial in zip(parts, partials, strict=True)])
    real = torch.view_as_real(flat) if flat.is_complex() else flat
    total = _all_reduce(real, "sum", group_of(partials[0].over), shards.device).to(flat.device)
    total = torch.view_as_complex(total) if flat.is_complex() else total
    sums = torch.split(total, [part.numel() for part in parts])
    return {entry: one.view(part.shape) for entry, one, part in zip(entries, sums, parts, strict=True)}


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.is_complex() or tensor.dtype == torch.float64 else tensor.float()


def replicated(norm: Tensor, shards: Shards) -> Tensor:
    """The norm as torch returns it for DTensors, but complete on every rank: replicated on a mesh of one dimension."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _flat_mesh(shards.plan)
    return DTensor.from_local(norm.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)


def _flat_mesh(plan: Plan) -> DeviceMesh:
    if plan.mesh.ndim == 1 or not plan.sets:
        return plan.mesh
    one = plan.sets[0]
    group = group_of(one)
    if one.flat_mesh is None:
        one.flat_mesh = DeviceMesh.from_group(group, one.mesh.device_type)
    return one.flat_mesh  # type: ignore[no-any-return]
