"""Statistics of sharded gradients: those of the full tensors, from one SUM and one MAX per set of ranks."""

import math
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

import fusedclip

from .. import oracle
from ..ranks import in_one_worker, on_ranks
from ..test_stats import FIELDS, check
from .shards import Case, all_reduces, assert_clipped, copies, random, same_bits_on_all_ranks
from .test_placements import FOUR, TWO, cases, sums_of_parts

pytestmark = in_one_worker


def every_placement(rank: int, names: list[str]) -> None:
    for name in names:
        given, count = cases(name)
        full = [case.full for case in given]
        made_for_each = ["parts of gradients"] * sums_of_parts(given) + ["sum", "max"] * count
        for p in (2.0, 1.0, math.inf):
            with all_reduces() as made:
                stats = fusedclip.get_grad_stats([case.gradient() for case in given], p)
            assert made == made_for_each
            check(stats, full, p)
            parameters = [case.parameter() for case in given]
            before, limit = copies(parameters), oracle.norm(full, p) / 2
            with all_reduces() as made:
                clipped = fusedclip.clip_grad_norm_with_stats_(parameters, limit, p)
            assert made == made_for_each
            assert_clipped(parameters, before, oracle.coefficient(2 * limit, limit))
            for field in FIELDS:
                for a, b in zip((stats, stats.total), (clipped, clipped.total), strict=True):
                    assert torch.equal(getattr(a, field), getattr(b, field))
                    same_bits_on_all_ranks(getattr(a, field).double())


@pytest.mark.parametrize(("world", "names"), [(2, TWO), (4, FOUR)])
def test_every_placement(world: int, names: list[str]) -> None:
    on_ranks(world, partial(every_placement, names=names))


def counts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = [random(8, 6), random(9, seed=1), random(4, 4, seed=2)]
    full[0][::2] = 0.0
    full[0][7, 5], full[1][8] = math.nan, -math.inf
    placements = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
    given = [Case(one, mesh, placement) for one, placement in zip(full, placements, strict=True)]
    gradients = [case.gradient() for case in given]
    check(fusedclip.get_grad_stats(gradients), full)
    twice = fusedclip.get_grad_stats([gradients[0], gradients[0], *gradients[1:]])
    for field in FIELDS:
        whole = fusedclip.get_grad_stats(gradients)
        each = getattr(twice, field)
        assert torch.equal(each[1:], getattr(whole, field)) or each[1:].isnan().any()
        assert torch.equal(torch.nan_to_num(getattr(twice.total, field)), torch.nan_to_num(getattr(whole.total, field)))
    parameters = [case.parameter() for case in given]
    with pytest.raises(RuntimeError, match="non-finite"):
        fusedclip.clip_grad_norm_with_stats_(parameters, 1.0, error_if_nonfinite=True)
    parameters[0].grad = parameters[1].grad = None
    if rank % 2:  # of one mesh dimension: what is replicated along the other has a gradient on both
        parameters[0].grad = gradients[0]
    stats = fusedclip.clip_grad_norm_with_stats_(parameters, math.inf)
    assert stats.zeros.tolist() == [int((full[0][:, 3:] == 0).sum()), 0, 0]
    assert stats.nonfinite.tolist() == [1, 0, 0]
    assert stats.total.nonfinite == 1


def test_counts_over_replicas_and_missing_gradients() -> None:
    on_ranks(4, counts)


def over_a_group(rank: int) -> None:
    from torch.distributed import group

    full = [[random(5, seed=10 * r + i) for i in range(2)] for r in range(2)]
    full[1][0][2] = 0.0
    with all_reduces() as made:
        stats = fusedclip.get_grad_stats(full[rank], group=group.WORLD)
    assert made == ["sum", "max"]
    check(fusedclip.get_grad_stats(full[rank]), full[rank])
    everything = [t for own in full for t in own]
    for field in FIELDS:
        assert torch.equal(getattr(stats, field), getattr(fusedclip.get_grad_stats(full[rank]), field))
    oracle.assert_close(stats.total.norm, oracle.norm(everything), 3e-6)
    oracle.assert_close(stats.total.abs_max, oracle.norm(everything, math.inf), 3e-6)
    assert stats.total.zeros == 1
    parameters = [Parameter(torch.zeros(5)) for _ in full[rank]]
    for parameter, gradient in zip(parameters, full[rank], strict=True):
        parameter.grad = gradient.clone()
    elsewhere = {parameters[1]} if rank == 1 else set()
    stats = fusedclip.clip_grad_norm_with_stats_(parameters, 1.0, group=group.WORLD, counted_elsewhere=elsewhere)
    oracle.assert_close(stats.total.norm, oracle.norm(everything[:3]), 3e-6)
    oracle.assert_close(stats.norm[1], oracle.norm([full[rank][1]]), 3e-6)


def test_over_a_group() -> None:
    on_ranks(2, over_a_group)
