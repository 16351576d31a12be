"""What differs between ranks: missing gradients, a NaN, process groups, gradients that another rank counts."""

import math
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import fusedclip
from fusedclip.amp import unscale_and_clip_grad_norm_
from fusedclip.gradients.shards import ReduceSet
from fusedclip.optim import clip_on_step
from fusedclip.process_groups import group_of

from .. import oracle
from ..conftest import parameters as plain_parameters
from ..ranks import in_one_worker, on_ranks
from .shards import Case, all_reduces, assert_clipped, copies, local, random, same_bits_on_all_ranks

pytestmark = in_one_worker
ORDERS = [2.0, 1.0, 3.0, math.inf, 0.0, -math.inf]


def dense_and_experts() -> tuple[list[Case], list[Case]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rest", "ep"))
    dense = [Case(random(8, 5), mesh, [Shard(0), Shard(1)]), Case(random(9, seed=1), mesh, [Shard(0), Replicate()])]
    return dense, [Case(random(4, 3, seed=n), experts, [Replicate(), Shard(0)]) for n in (2, 3)]


def missing_gradients_hang_nobody(rank: int) -> None:
    """One expert got no tokens: the ranks that hold its shard have no gradient, all others do. One rank has none."""
    dense, experts = dense_and_experts()
    expert_rank = rank % 2
    for p in ORDERS:
        params = [case.parameter() for case in dense + experts]
        if expert_rank == 1:
            params[3].grad = None
        full = [case.full for case in dense + experts[:1]] + [experts[1].full[:2]]
        expected = oracle.norm(full, p)
        before = [None if q.grad is None else local(q.grad).clone() for q in params]
        with all_reduces() as made:
            norm = fusedclip.clip_grad_norm_(params, expected / 2, p)
        assert made == ["max" if math.isinf(p) else "sum"] * 2
        oracle.assert_close(norm, expected, 3e-6)
        same_bits_on_all_ranks(norm)
        for parameter, gradient in zip(params, before, strict=True):
            if gradient is not None:
                oracle.assert_scaled(local(parameter.grad), gradient, oracle.coefficient(expected, expected / 2), 1.5)
        each = fusedclip.clip_grad_norm_per_tensor_(params, 1.0, p)
        same_bits_on_all_ranks(each)
        assert each[3] > 0
        with all_reduces() as made:
            found = fusedclip.clip_grad_norm_scopes_({"dense": params[:2], "experts": params[2:]}, 1.0, p)
        assert len(made) == 2
        for value in found.values():
            same_bits_on_all_ranks(value)


def a_rank_without_any_gradient(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for dtype in (torch.float32, torch.float64):
        for p in ORDERS:
            case = Case(random(6, 5).to(dtype), mesh, [Shard(0)])
            params = [case.parameter()]
            if rank == 1:
                params[0].grad = None
            norm = fusedclip.clip_grad_norm_(params, 0.1, p)
            assert norm.dtype == dtype
            oracle.assert_close(norm, oracle.norm([case.full[:3]], p), 3e-6)
            same_bits_on_all_ranks(norm)
            handle = clip_on_step(torch.optim.SGD(params, 0.1), 0.1, p)
            handle.remove()


def a_nan_or_inf_on_one_rank_reaches_all(rank: int) -> None:
    dense, experts = dense_and_experts()
    for bad in (math.nan, math.inf):
        for place, case in enumerate(dense + experts):
            for p in (2.0, 1.0, 3.0, math.inf):
                params = [one.parameter() for one in dense + experts]
                # An expert's shard is on two ranks, whose gradients are the same after any backward.
                here = rank == 2 or (rank == 0 and place >= 2)
                if here:
                    local(params[place].grad).view(-1)[0] = bad
                norm = fusedclip.clip_grad_norm_(params, 1.0, p)
                assert norm.isnan() if bad != bad else norm == math.inf, (case.placements, norm)
                zero = 0.0 if bad == math.inf else math.nan
                assert_all(local(params[1 - min(place, 1)].grad), zero)
                params = [one.parameter() for one in dense + experts]
                if here:
                    local(params[place].grad).view(-1)[0] = bad
                before = copies(params)
                with pytest.raises(RuntimeError, match=f"\\[{place}\\]" if here else "finite norm of its own"):
                    fusedclip.clip_grad_norm_(params, 1.0, p, error_if_nonfinite=True)
                assert all(equal(local(q.grad), b) for q, b in zip(params, before, strict=True))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_all(tensor: torch.Tensor, value: float) -> None:
    assert (tensor.isnan() if value != value else tensor == value).all(), tensor


def pipeline_stages(rank: int) -> None:
    """Two stages of two ranks each: the mesh of the stage first, then across stages, with one vector for all scopes."""
    stages = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, mesh = rank // 2, stages["dp"]
    across = stages.get_group("pp")
    fulls = [[random(6, 3, seed=10 * s), random(7, seed=10 * s + 1)] for s in range(2)]
    for p in ORDERS:
        expected = oracle.norm(fulls[0] + fulls[1], p)
        params = [Case(full, mesh, [Shard(0)]).parameter() for full in fulls[stage]]
        before = copies(params)
        with all_reduces() as made:
            norm = fusedclip.clip_grad_norm_(params, expected / 3, p, group=across)
        assert len(made) == 2
        oracle.assert_close(norm, expected, 3e-6)
        same_bits_on_all_ranks(norm)
        assert_clipped(params, before, oracle.coefficient(expected, expected / 3))
        with all_reduces() as made:
            found = fusedclip.clip_grad_norm_scopes_({"a": params[:1], "b": params[1:]}, math.inf, p, group=[across])
        assert len(made) == 2
        coef = oracle.coefficient(expected, expected / 3)
        if p != 0:
            oracle.assert_close(found["a"], coef * oracle.norm([fulls[0][0], fulls[1][0]], p), 3e-6)
            oracle.assert_close(found["b"], coef * oracle.norm([fulls[0][1], fulls[1][1]], p), 3e-6)


def several_groups(rank: int) -> None:
    """Plain gradients, sharded by hand over two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    shards = [random(5, seed=r) for r in range(4)]
    for p in ORDERS:
        with all_reduces() as made:
            norm = fusedclip.get_total_norm([shards[rank]], p, group=[mesh.get_group("a"), mesh.get_group("b")])
        assert len(made) == 2
        oracle.assert_close(norm, oracle.norm(shards, p), 3e-6)
        same_bits_on_all_ranks(norm)


def tied_embeddings(rank: int) -> None:
    """Two stages hold the same embedding. Its gradient is the same on both; the first one counts it."""
    embedding, own = random(6, 4), [random(3, seed=1), random(5, seed=2)]
    for p in ORDERS:
        expected = oracle.norm([embedding, *own], p)
        for by in ("set", "list", "predicate"):
            params = plain_parameters([embedding.clone(), own[rank].clone()])
            tied = params[0]
            elsewhere = {"set": {tied}, "list": [tied], "predicate": lambda q, tied=tied: q is tied}[by]
            before = copies(params)
            norm = fusedclip.clip_grad_norm_(
                params,
                expected / 2,
                p,
                group=dist.group.WORLD,
                counted_elsewhere=elsewhere if rank == 1 else None,
            )
            oracle.assert_close(norm, expected, 3e-6)
            same_bits_on_all_ranks(norm)
            assert_clipped(params, before, oracle.coefficient(expected, expected / 2))
    params = plain_parameters([embedding.clone(), own[rank].clone()])
    elsewhere = params[:1] if rank == 1 else []
    optimizer = torch.optim.SGD(params, lr=1.0)
    handle = clip_on_step(optimizer, 1.0, group=dist.group.WORLD, counted_elsewhere=elsewhere)
    optimizer.step()
    assert handle.total_norm is not None
    oracle.assert_close(handle.total_norm, oracle.norm([embedding, *own]), 3e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    params = plain_parameters([embedding.clone(), own[rank].clone()])
    optimizer = torch.optim.SGD(params, lr=1.0)
    norm = unscale_and_clip_grad_norm_(
        scaler, optimizer, 1.0, group=dist.group.WORLD, counted_elsewhere=params[:1] if rank == 1 else None
    )
    oracle.assert_close(norm, oracle.norm([embedding, *own]), 3e-6)
    with pytest.raises(ValueError, match="without group="):
        fusedclip.clip_grad_norm_(params, 1.0, counted_elsewhere=params[:1])
    for wrong in (params[0], 3, [3], "embedding"):
        with pytest.raises(TypeError, match="counted_elsewhere= must be"):
            fusedclip.clip_grad_norm_(params, 1.0, group=dist.group.WORLD, counted_elsewhere=wrong)  # type: ignore[arg-type]


def dtensors_as_limits_and_norms(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(6, 5), mesh, [Shard(0)])
    replicated = DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()], run_check=False)
    part = DTensor.from_local(torch.tensor(1.0), mesh, [Partial()], run_check=False)  # of 2, too
    for two in (replicated, part):
        for call in (
            lambda params, two=two: fusedclip.clip_grads_with_norm_(params, 1.0, two),
            lambda params, two=two: fusedclip.clip_grads_with_norm_(params, two / 2, 2.0),
        ):
            params = [case.parameter()]
            before = copies(params)
            call(params)
            assert_clipped(params, before, oracle.coefficient(2.0, 1.0))
        params = [case.parameter()]
        fusedclip.clip_grad_norm_(params, two)
        oracle.assert_close(fusedclip.get_total_norm([params[0].grad]), 2.0, 1e-6)
        fusedclip.clip_grad_value_(params, two)


def the_same_bits_twice(rank: int) -> None:
    dense, experts = dense_and_experts()
    for p in ORDERS:
        runs = []
        for _ in range(2):
            params = [case.parameter() for case in dense + experts]
            runs.append([fusedclip.clip_grad_norm_(params, 1e-3, p), *copies(params)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def one_gradient_twice(rank: int) -> None:
    """Listed twice it counts once, on the rank whose shard is empty as well."""
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(1, 7), mesh, [Shard(0)])
    for p in ORDERS:
        one = case.parameter()
        other = Parameter(one.detach())
        other.grad = one.grad
        before = copies([one])
        norm = fusedclip.clip_grad_norm_([one, one, other], 1e-3, p)
        oracle.assert_close(norm, oracle.norm([case.full], p), 3e-6)
        assert_clipped([one], before, oracle.coefficient(oracle.norm([case.full], p), 1e-3))


def other_layouts(rank: int) -> None:
    """Strided and complex shards take the closer look; both autograd counters hear of the write."""
    mesh = init_device_mesh("cpu", (2,))
    strided = random(8, 6)[:, ::2]
    complex_ = torch.view_as_complex(random(6, 2, seed=1))
    for p in ORDERS:
        params = []
        for full in (strided, complex_):
            half = full[4 * rank : 4 * rank + 4] if full is strided else full[3 * rank : 3 * rank + 3]
            params.append(Parameter(DTensor.from_local(torch.zeros_like(half), mesh, [Shard(0)], run_check=False)))
            params[-1].grad = DTensor.from_local(half.clone(memory_format=torch.preserve_format) if full is complex_
                                                 else random(8, 6)[4 * rank : 4 * rank + 4, ::2],
                                                 mesh, [Shard(0)], run_check=False)  # fmt: skip
        before = copies(params)
        expected = oracle.norm([strided, complex_], p)
        versions = [(q.grad._version, local(q.grad)._version) for q in params]
        norm = fusedclip.clip_grad_norm_(params, expected / 2, p)
        oracle.assert_close(norm, expected, 3e-6)
        for parameter, gradient, old in zip(params, before, versions, strict=True):
            after, gradient = (
                torch.view_as_real(g) if g.is_complex() else g for g in (local(parameter.grad), gradient)
            )
            oracle.assert_scaled(after, gradient, oracle.coefficient(expected, expected / 2), 2)
            assert parameter.grad._version > old[0]
            assert local(parameter.grad)._version > old[1]


def subset_of_the_world(rank: int) -> None:
    """A mesh of three of four ranks, flattened over both its dimensions but not the whole world's group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))
    from torch.distributed.device_mesh import DeviceMesh

    stage = DeviceMesh("cpu", [[0], [1], [2]], mesh_dim_names=("a", "b"))
    del mesh
    if rank < 3:
        case = Case(random(7, 4), stage, [Shard(0), Shard(1)])
        oracle.assert_close(fusedclip.get_total_norm([case.gradient()]), oracle.norm([case.full]), 3e-6)
        several = ReduceSet(stage, (0, 1), (0, 1, 2))  # as of a mesh with more than one rank along both
        made, world = (group._get_backend(torch.device("cpu")) for group in (group_of(several), dist.group.WORLD))
        assert made is not world
        assert made.options._timeout == world.options._timeout


def different_calls_are_told(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    cases = [Case(random(6, 5), mesh, [Shard(0)]), Case(random(6, 4), mesh, [Shard(0)])]
    world = dist.group.WORLD
    for call in (
        lambda params: fusedclip.clip_grad_norm_(params, 1e-3, 1.0 + rank),
        lambda params: fusedclip.clip_grad_norm_(params[rank:], 1e-3),
        lambda params: fusedclip.clip_grad_norm_per_tensor_(params, 1e-3, 2.0 + rank),
        lambda params: fusedclip.clip_grad_norm_(plain_parameters([torch.ones(3)]), 1e-3, 1.0 + rank, group=world),
        lambda params: fusedclip.clip_grad_norm_scopes_({"ab"[rank]: params[:1], "ba"[rank]: params[1:]}, 1e-3),
    ):
        params = [case.parameter() for case in cases]
        before = copies(params)
        with pytest.raises(RuntimeError, match="ask for different norms"):
            call(params)
        assert all(torch.equal(local(q.grad), b) for q, b in zip(params, before, strict=True))


def a_rank_that_does_not_call(rank: int) -> None:
    """The others end with the process group's own timeout, with their gradients as they were."""
    mesh = init_device_mesh("cpu", (2,))
    params = [Case(random(6, 5), mesh, [Shard(0)]).parameter()]
    fusedclip.clip_grad_norm_(params, math.inf)
    before = copies(params)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|[Tt]imeout"):
            fusedclip.clip_grad_norm_(params, 1e-3)
        assert torch.equal(local(params[0].grad), before[0])
    else:
        time.sleep(4)
    raise SystemExit  # the group is of no use any more


@pytest.mark.parametrize(
    ("count", "scenario"),
    [
        (2, a_rank_without_any_gradient),
        (2, tied_embeddings),
        (2, dtensors_as_limits_and_norms),
        (2, one_gradient_twice),
        (2, other_layouts),
        (2, different_calls_are_told),
        (4, missing_gradients_hang_nobody),
        (4, a_nan_or_inf_on_one_rank_reaches_all),
        (4, pipeline_stages),
        (4, several_groups),
        (4, the_same_bits_twice),
        (4, subset_of_the_world),
    ],
)
def test_ranks(count: int, scenario: Callable[[int], None]) -> None:
    on_ranks(count, scenario)


def test_a_rank_that_does_not_call() -> None:
    on_ranks(2, a_rank_that_does_not_call, seconds=2)
