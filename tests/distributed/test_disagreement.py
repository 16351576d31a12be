"""Ranks that mean different things, process groups that are gone, and DTensors that are not what they seem."""

import math
import tempfile
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import fusedclip
from fusedclip.gradients import shards

from .. import oracle
from ..conftest import parameters as plain_parameters
from ..ranks import in_one_worker, on_ranks
from .shards import Case, all_reduces, copies, local, random

pytestmark = in_one_worker
Call = Callable[[list[Parameter]], object]


def the_same_scopes_and_the_same_order(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    cases = [Case(random(n, 3, seed=n), mesh, [Shard(0)]) for n in (4, 6, 2)]

    def split(params: list[Parameter], p: float) -> object:
        at = 1 + rank
        return fusedclip.clip_grad_norm_scopes_({"a": params[:at], "b": params[at:]}, 1e-3, p)

    def swapped(params: list[Parameter], p: float) -> object:
        a, b = params[rank], params[1 - rank]
        return fusedclip.clip_grad_norm_scopes_({"a": [a], "b": [b]}, 1e-3, p)

    calls: list[Call] = [
        *(lambda params, p=p: split(params, p) for p in (2.0, math.inf, 0.0)),
        *(lambda params, p=p: swapped(params, p) for p in (2.0, -math.inf, 0.0)),
        lambda params: fusedclip.clip_grad_norm_(params[rank : rank + 2], 1e-3),
        lambda params: fusedclip.clip_grad_norm_per_tensor_(params[:: 1 - 2 * rank], 1e-3),
        lambda params: fusedclip.clip_grad_norm_with_stats_(params[:: 1 - 2 * rank], 1e-3),
    ]
    for call in calls:
        params = [case.parameter() for case in cases]
        before = copies(params)
        with pytest.raises(RuntimeError, match="ask for different norms"):
            call(params)
        assert all(torch.equal(local(q.grad), b) for q, b in zip(params, before, strict=True))
    params = [case.parameter() for case in cases]  # one norm of all, and the order inside of a scope, is free
    norm = fusedclip.clip_grad_norm_(params[:: 1 - 2 * rank], math.inf)
    oracle.assert_close(norm, oracle.norm([case.full for case in cases]), 3e-6)
    fusedclip.clip_grad_norm_scopes_({"a": params[:2][:: 1 - 2 * rank], "b": params[2:]}, math.inf)


def partials_of_other_sums(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(6, 5), mesh, [Shard(0)])
    norm = case.gradient().norm()
    assert type(norm.placements[0]) is not Partial  # a sum of squares, then the root
    with pytest.raises(TypeError, match=r"full_tensor\(\)"):
        fusedclip.get_total_norm([norm])
    with fusedclip.patch_torch():
        given = torch.nn.utils.get_total_norm([norm])
    oracle.assert_close(given.full_tensor(), oracle.norm([case.full]), 3e-6)
    oracle.assert_close(fusedclip.get_total_norm([norm.full_tensor()]), oracle.norm([case.full]), 3e-6)


def no_gradient_anywhere(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case, world = Case(random(6, 5), mesh, [Shard(0)]), dist.group.WORLD
    for p in (-math.inf, -1.0, 0.0, 2.0):
        params = [case.parameter() for _ in range(3)]
        params[0].grad = params[1].grad = None
        if rank:
            params[2].grad = None
        assert fusedclip.clip_grad_norm_(params[:2], 1.0, p) == 0
        plain = plain_parameters([torch.ones(3)])
        plain[0].grad = None
        assert fusedclip.clip_grad_norm_(plain, 1.0, p, group=world) == 0
        expected = oracle.norm([case.full[:3]], p)
        with all_reduces() as made:
            found = fusedclip.clip_grad_norm_scopes_({"a": params[:1], "b": [], "c": params[1:]}, math.inf, p)
        assert len(made) == 1
        assert found["a"] == found["b"] == 0
        oracle.assert_close(found["c"], expected, 3e-6)
        each = fusedclip.clip_grad_norm_per_tensor_(params, math.inf, p)
        assert each[:2].tolist() == [0, 0]
        assert each[2] > 0


def a_world_that_was_destroyed(rank: int) -> None:
    """Its groups are not kept alive, and DTensors that outlive it use the next one's, as torch does."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    mesh = DeviceMesh("cpu", [[[0, 1]]])
    case = Case(random(6, 5), mesh, [Shard(0)] * 3)
    params = [case.parameter()]
    expected = oracle.norm([case.full])
    oracle.assert_close(fusedclip.clip_grad_norm_(params, math.inf), expected, 3e-6)
    dist.barrier()
    dist.destroy_process_group()
    store = f"file://{folder[0]}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    oracle.assert_close(fusedclip.clip_grad_norm_(params, math.inf), expected, 3e-6)
    case = Case(random(6, 5), init_device_mesh("cpu", (2,)), [Shard(0)])
    oracle.assert_close(fusedclip.clip_grad_norm_([case.parameter()], math.inf), expected, 3e-6)
    assert [plan.mesh.ndim for plan in shards._plans] == [1]  # the old mesh knows its groups


def gradients_still_on_their_way(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(6, 5), mesh, [Shard(0)])
    gradient = case.gradient()
    assert isinstance(gradient, DTensor)
    parameter = Parameter(torch.zeros_like(gradient.redistribute(placements=[Replicate()])))
    parameter.grad = gradient.redistribute(placements=[Replicate()], async_op=True)
    oracle.assert_close(fusedclip.clip_grad_norm_([parameter], 1.0), oracle.norm([case.full]), 3e-6)
    oracle.assert_close(parameter.grad.full_tensor().norm(), 1.0, 1e-5)


def groups_that_are_summed_anyway(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(6, 5), mesh, [Shard(0)])
    params = [case.parameter()]
    before = copies(params)
    for call in (
        lambda: fusedclip.clip_grad_norm_(params, 1e-3, group=dist.group.WORLD),
        lambda: fusedclip.clip_grad_norm_with_stats_(params, 1e-3, group=dist.group.WORLD),
    ):
        with all_reduces() as made, pytest.raises(ValueError, match=r"group= names .*counted 2 times"):
            call()
        assert not made
    assert torch.equal(local(params[0].grad), before[0])
    norm = fusedclip.clip_grad_norm_(params, math.inf, math.inf, group=dist.group.WORLD)  # of which it is the same
    oracle.assert_close(norm, oracle.norm([case.full], math.inf), 3e-6)
    whole = Case(random(6, 5), mesh, [Replicate()]).parameter()
    norm = fusedclip.clip_grad_norm_([whole], math.inf, group=dist.group.WORLD)
    oracle.assert_close(norm, math.sqrt(2) * oracle.norm([case.full]), 3e-6)


def dtypes_that_differ(rank: int) -> None:
    """A plain fp64 gradient on one rank alone: both do as many all-reduces."""
    mesh = init_device_mesh("cpu", (2,))
    params = [Case(random(6, 5), mesh, [Shard(0)]).parameter()]
    params += plain_parameters([torch.ones(3, dtype=torch.float64 if rank else torch.float32)])
    optimizer = torch.optim.SGD(params, 0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with all_reduces() as made:
        fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    assert len(made) == 1


@pytest.mark.parametrize(
    "scenario",
    [
        the_same_scopes_and_the_same_order,
        partials_of_other_sums,
        no_gradient_anywhere,
        a_world_that_was_destroyed,
        gradients_still_on_their_way,
        groups_that_are_summed_anyway,
        dtypes_that_differ,
    ],
)
def test_on_two_ranks(scenario: Callable[[int], None]) -> None:
    on_ranks(2, scenario)


def test_no_group_to_count_elsewhere() -> None:
    (parameter,) = plain_parameters([torch.ones(3)])
    with pytest.raises(ValueError, match="counted_elsewhere= without group="):
        fusedclip.clip_grad_norm_([parameter], 1.0, group=[], counted_elsewhere={parameter})
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.ones(3))
