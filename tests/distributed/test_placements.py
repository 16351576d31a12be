"""Every placement and mesh, every order, every function: against the fp64 norm of the full tensors."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import fusedclip

from .. import oracle
from ..ranks import in_one_worker, on_ranks
from .shards import Case, all_reduces, assert_clipped, coarse, copies, local, random, same_bits_on_all_ranks

pytestmark = in_one_worker
ORDERS = [2.0, 1.0, 3.0, math.inf, 0.0, -math.inf]


def meshes() -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """(dp, tp), (dp_mod_ep, ep) and the first dimension alone, of four ranks."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return world, init_device_mesh("cpu", (2, 2), mesh_dim_names=("rest", "ep")), world["dp"]


def cases(name: str) -> tuple[list[Case], int]:
    """Gradients, and the number of all-reduces that their norm takes beside those for sums of parts."""
    if dist.get_world_size() == 2:
        flat = init_device_mesh("cpu", (2,))
        return {
            "fsdp": ([Case(random(6, 5), flat, [Shard(0)]), Case(random(40, seed=1), flat, [Shard(0)])], 1),
            # The second rank has less of one, and nothing of the other.
            "uneven": ([Case(random(3, 5), flat, [Shard(0)]), Case(random(1, 7, seed=1), flat, [Shard(0)])], 1),
            "empty": ([Case(random(0, 5), flat, [Shard(0)]), Case(random(8, seed=1), flat, [Shard(0)])], 1),
            "replicated": ([Case(random(6), flat, [Replicate()]), Case(random(3, 3, seed=1))], 0),
            "beside plain": (
                [Case(random(5)), Case(random(9, 2, seed=1), flat, [Shard(1)]), Case(random(2, seed=2))],
                1,
            ),
            "one sharded, one not": ([Case(random(7), flat, [Replicate()]), Case(random(6), flat, [Shard(0)])], 1),
            "partial": ([Case(coarse(6), flat, [Partial()]), Case(random(6, 4, seed=1), flat, [Shard(1)])], 1),
            "averaged": ([Case(coarse(6), flat, [Partial("avg")]), Case(coarse(4), flat, [Partial()])], 0),
            "bf16": (
                [Case(random(6, 9, dtype=torch.bfloat16), flat, [Shard(0)]), Case(random(3), flat, [Shard(0)])],
                1,
            ),
            "fp64": ([Case(random(6, 9).double(), flat, [Shard(0)]), Case(random(3), flat, [Shard(0)])], 1),
        }[name]
    world, experts, dp = meshes()
    strided = [_StridedShard(0, split_factor=2), Shard(0)]
    return {
        "hsdp": ([Case(random(n), world, [Replicate(), Shard(0)]) for n in (30, 3)], 1),
        "tp": ([Case(random(6, 4), world["tp"], [Shard(1)]), Case(random(6, seed=1), world["tp"], [Replicate()])], 1),
        "fsdp + tp": (
            [
                Case(random(8, 5), world, strided),
                Case(random(7, 3, seed=1), world, [Shard(0), Shard(1)]),
                Case(random(9, seed=2), world, [Shard(0), Replicate()]),
                Case(random(5, seed=3), world, [Replicate(), Replicate()]),
            ],
            1,
        ),
        "fsdp + tp, one dimension each": (
            [Case(random(8, 5), world, [Shard(0), Replicate()]), Case(random(7, 3), world, [Replicate(), Shard(1)])],
            2,
        ),
        "fsdp on a mesh of its own": ([Case(random(8, 5), dp, [Shard(0)]), Case(random(8, 6), world, strided)], 2),
        "experts": (
            [
                Case(random(4, 3, 2), experts, [Replicate(), Shard(0)]),
                Case(random(9, seed=1), world, [Shard(0), Shard(0)]),
                Case(random(8, seed=2)),
            ],
            2,
        ),
        "experts, sharded over all": (
            [Case(random(4, 3, 2), experts, [Shard(1), Shard(0)]), Case(random(9, 2), world, [Shard(0), Shard(1)])],
            1,
        ),
        "sequence parallel": (
            [
                Case(coarse(6), world, [Replicate(), Partial()]),
                Case(coarse(6, seed=1), world, [Shard(0), Partial()]),
                Case(random(4, 6, seed=2), world, [Shard(0), Shard(1)]),
            ],
            1,
        ),
        "partial over both": ([Case(coarse(6), world, [Partial(), Partial("avg")])], 0),
    }[name]  # fmt: skip


TWO = [
    "fsdp", "uneven", "empty", "replicated", "beside plain", "one sharded, one not", "partial", "averaged", "bf16",
    "fp64",
]  # fmt: skip
FOUR = [
    "hsdp", "tp", "fsdp + tp", "fsdp + tp, one dimension each", "fsdp on a mesh of its own", "experts",
    "experts, sharded over all", "sequence parallel", "partial over both",
]  # fmt: skip


def check(given: list[Case], p: float, expected_count: int) -> None:
    expected = oracle.norm([case.full for case in given], p)
    clips_to(given, p, expected, expected_count)
    value_and_given_norm_need_no_collective(given, expected)
    each_by_itself(given, p)
    scopes(given, p, expected_count)


def sums_of_parts(given: list[Case]) -> int:
    """One for all gradients that are summed over the same ranks."""
    dims = {tuple(d for d, p in enumerate(case.placements) if isinstance(p, Partial)) for case in given}
    return len(dims - {()})


def clips_to(given: list[Case], p: float, expected: float, expected_count: int) -> None:
    for limit in (expected / 2, math.inf):
        for engine in ("cpu", "reference"):
            parameters = [case.parameter() for case in given]
            before = copies(parameters)
            versions = [parameter.grad._version for parameter in parameters]
            with fusedclip.backends.use(engine), all_reduces() as made:
                norm = fusedclip.clip_grad_norm_(parameters, limit, p)
            assert type(norm) is Tensor
            assert norm.dtype == (torch.float64 if any(c.full.dtype == torch.float64 for c in given) else torch.float32)
            oracle.assert_close(norm, expected, 3e-6)
            assert_clipped(parameters, before, oracle.coefficient(expected, limit))
            same_bits_on_all_ranks(norm)
            statistics = ["max" if math.isinf(p) else "sum"] * expected_count
            assert made == ["parts of gradients"] * sums_of_parts(given) + statistics
            if limit < expected:
                for parameter, version in zip(parameters, versions, strict=True):
                    assert parameter.grad is not None
                    assert parameter.grad._version > version or local(parameter.grad).numel() == 0
            total = fusedclip.get_total_norm([case.gradient() for case in given], p)
            assert torch.equal(total, norm)


def value_and_given_norm_need_no_collective(given: list[Case], expected: float) -> None:
    parameters = [case.parameter() for case in given]
    before = copies(parameters)
    with all_reduces() as made:
        fusedclip.clip_grads_with_norm_(parameters, 0.5, torch.tensor(expected))
        assert_clipped(parameters, before, oracle.coefficient(float(torch.tensor(expected)), 0.5))
        if any(isinstance(placement, Partial) for case in given for placement in case.placements):
            with pytest.raises(TypeError, match="one part of a sum"):
                fusedclip.clip_grad_value_(parameters, 0.1)
        else:
            fusedclip.clip_grad_value_(parameters, 0.1)
            assert all(local(parameter.grad).abs().le(0.1001).all() for parameter in parameters)
    assert not made


def each_by_itself(given: list[Case], p: float) -> None:
    one = [float(oracle.root(oracle.lifted(oracle.exact(case.full), p), p)) for case in given]
    norms = fusedclip.get_per_tensor_norms([case.gradient() for case in given], p)
    for norm, expected in zip(norms, one, strict=True):
        oracle.assert_close(norm, expected, 3e-6)
    same_bits_on_all_ranks(norms)
    parameters = [case.parameter() for case in given]
    before = copies(parameters)
    assert torch.equal(fusedclip.clip_grad_norm_per_tensor_(parameters, 1.5, p), norms)
    assert_clipped(parameters, before, *(oracle.coefficient(expected, 1.5) for expected in one))


def scopes(given: list[Case], p: float, expected_count: int) -> None:
    parameters = [case.parameter() for case in given]
    before = copies(parameters)
    with all_reduces() as made:
        found = fusedclip.clip_grad_norm_scopes_({"a": parameters[:1], "b": parameters[1:]}, {"a": 0.5, "b": None}, p)
    expected = [oracle.norm([case.full for case in part], p) if part else 0.0 for part in (given[:1], given[1:])]
    oracle.assert_close(found["a"], expected[0], 3e-6)
    if given[1:]:
        oracle.assert_close(found["b"], expected[1], 3e-6)
    assert_clipped(parameters, before, oracle.coefficient(expected[0], 0.5), *[1.0] * len(given[1:]))
    assert made == ["parts of gradients"] * sums_of_parts(given) + ["max" if math.isinf(p) else "sum"] * expected_count


def two_ranks(rank: int) -> None:
    check_all(TWO)


def four_ranks(rank: int) -> None:
    check_all(FOUR)


def check_all(names: list[str]) -> None:
    for name in names:
        given, expected_count = cases(name)
        for p in ORDERS:
            try:
                check(given, p, expected_count)
            except Exception as error:
                raise AssertionError(f"{name}, p = {p}") from error


def test_on_two_ranks() -> None:
    on_ranks(2, two_ranks)


def test_on_four_ranks() -> None:
    on_ranks(4, four_ranks)
