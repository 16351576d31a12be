"""group=: ranks that would get different norms, raise alone or wait for each other for ever; two gloo processes."""

import math
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

import fusedclip

from . import oracle
from .conftest import parameters
from .ranks import in_one_worker, on_two_ranks

pytestmark = in_one_worker
NORM_TYPES = [2.0, 1.0, 3.0, 0.0, math.inf, -math.inf]


def gradients(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n + rank, generator=generator) + 0.01 for n in (3, 500)]


def everything() -> list[torch.Tensor]:
    return gradients(0) + gradients(1)


def clips_to_the_common_norm(rank: int) -> None:
    for p in NORM_TYPES:
        for engine in fusedclip.backends.available():
            if engine in ("cpu", "reference"):
                grads, before = gradients(rank), gradients(rank)
                expected = oracle.norm(everything(), p)
                with fusedclip.backends.use(engine):
                    norm = fusedclip.clip_grad_norm_(parameters(grads), expected / 2, p, group=dist.group.WORLD)
                oracle.assert_close(norm, expected, 3e-6)
                for after, b in zip(grads, before, strict=True):
                    oracle.assert_scaled(after, b, oracle.coefficient(expected, expected / 2), 1.5)
                total = fusedclip.get_total_norm(before, p, group=dist.group.WORLD)
                oracle.assert_close(total, expected, 3e-6)


def ranks_get_the_same_bits(rank: int) -> None:
    norm = fusedclip.get_total_norm(gradients(rank), group=dist.group.WORLD)
    both = [torch.empty(()) for _ in range(2)]
    dist.all_gather(both, norm)
    assert torch.equal(both[0], both[1])


def nan_on_one_rank_reaches_all(rank: int) -> None:
    for p in NORM_TYPES:
        grads = gradients(rank)
        if rank == 1:
            grads[0][0] = math.nan
        norm = fusedclip.clip_grad_norm_(parameters(grads), 1.0, p, group=dist.group.WORLD)
        assert norm.isnan() or p == 0
        assert all(g.isnan().all() for g in grads) or p == 0


def all_ranks_raise_together(rank: int) -> None:
    grads = gradients(rank)
    if rank == 1:
        grads[1][7] = math.inf
    before = [g.clone() for g in grads]
    culprit = r"parameters\[1\]" if rank == 1 else "Every tensor here has a finite norm"
    with pytest.raises(RuntimeError, match=culprit):
        fusedclip.clip_grad_norm_(parameters(grads), 1.0, error_if_nonfinite=True, group=dist.group.WORLD)
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


def a_rank_without_gradients_takes_part(rank: int) -> None:
    for p in NORM_TYPES:
        grads = gradients(0) if rank == 0 else []
        expected = oracle.norm(gradients(0), p)
        norm = fusedclip.clip_grad_norm_(parameters(grads), 1e-3, p, group=dist.group.WORLD)
        oracle.assert_close(norm, expected, 3e-6)


def wrong_groups_are_refused(rank: int) -> None:
    alone = dist.new_group([0])
    grads = gradients(rank)
    before = [g.clone() for g in grads]
    if rank == 0:
        oracle.assert_close(fusedclip.get_total_norm(grads, group=alone), oracle.norm(grads), 3e-6)
    else:
        with pytest.raises(ValueError, match="does not belong to"):
            fusedclip.clip_grad_norm_(parameters(grads), 1e-3, group=alone)
    with pytest.raises(TypeError, match="group= must be"):
        fusedclip.clip_grad_norm_(parameters(grads), 1e-3, group="world")  # type: ignore[arg-type]
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


@pytest.mark.parametrize(
    "scenario",
    [
        clips_to_the_common_norm,
        ranks_get_the_same_bits,
        nan_on_one_rank_reaches_all,
        all_ranks_raise_together,
        a_rank_without_gradients_takes_part,
        wrong_groups_are_refused,
    ],
)
def test_two_ranks(scenario: Callable[[int], None]) -> None:
    on_two_ranks(scenario)


def test_a_group_of_one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            norm = fusedclip.clip_grad_norm_(parameters([torch.tensor([3.0, 4.0])]), 1.0, group=dist.group.WORLD)
            assert norm == 5
        finally:
            dist.destroy_process_group()
