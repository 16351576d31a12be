"""Sharded gradients: the state is that of one process with the full tensors, and goes on in another world size."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fusedclip import adaptive
from fusedclip.adaptive import AdaptiveRule
from fusedclip.monitor import GradMonitor

from ..conftest import Engine
from ..ranks import in_one_worker, on_two_ranks
from .steps import SHAPES, gradients

pytestmark = in_one_worker
HERE = Engine("cpu", "cpu")
STEPS = 60


def rules() -> list[AdaptiveRule]:
    return [
        adaptive.AutoClip(50.0),
        adaptive.ZClip(warmup_steps=5, max_grad_norm=None),
        adaptive.AdaGC(warmup_steps=5),
        adaptive.EMAClip(1.05),
    ]


def scenario(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placements = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(1)]]
    for number, (sharded, whole) in enumerate(zip(rules(), rules(), strict=True)):
        full = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        params = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, where)) for p, where in zip(full, placements, strict=True)
        ]
        for step, grads in enumerate(gradients(HERE, STEPS)):
            if step == STEPS // 2:  # from two ranks to one and back
                states = sharded.state_dict(), whole.state_dict()
                sharded, whole = rules()[number], rules()[number]
                sharded.load_state_dict(states[1])
                whole.load_state_dict(states[0])
            for parameter, own, grad, where in zip(full, params, grads, placements, strict=True):
                parameter.grad = None if grad is None else grad.clone()
                own.grad = None if grad is None else distribute_tensor(grad, mesh, where, src_data_rank=None)
            expected, norm = whole.clip_(full), sharded.clip_(params)
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, equal_nan=True)
            for parameter, own in zip(full, params, strict=True):
                if parameter.grad is not None and norm.isfinite():
                    assert own.grad is not None
                    torch.testing.assert_close(own.grad.full_tensor(), parameter.grad, rtol=1e-5, atol=1e-12)
        states = sharded.state_dict()["state"]
        for name, value in whole.state_dict()["state"].items():
            torch.testing.assert_close(states[name], value, rtol=1e-9, atol=0)
            everywhere = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(everywhere, states[name])
            assert torch.equal(everywhere[0], everywhere[1])


def recorded(rank: int) -> None:
    """A monitor's records of shards are those of full tensors, on each rank."""
    mesh = init_device_mesh("cpu", (2,))
    names, placements = ["a", "b", "c", "d"], [[Shard(0)], [Shard(0)], [Replicate()], [Shard(1)]]
    full = {name: nn.Parameter(torch.zeros(shape)) for name, shape in zip(names, SHAPES, strict=True)}
    shards = {
        name: nn.Parameter(distribute_tensor(p.detach(), mesh, where))
        for (name, p), where in zip(full.items(), placements, strict=True)
    }
    whole, sharded = GradMonitor(full), GradMonitor(shards)
    for grads in gradients(HERE, 15):
        for name, grad, where in zip(names, grads, placements, strict=True):
            full[name].grad = None if grad is None else grad.clone()
            shards[name].grad = None if grad is None else distribute_tensor(grad, mesh, where, src_data_rank=None)
        whole.clip_grad_norm_(0.5)
        sharded.clip_grad_norm_(0.5)
    whole.flush()
    sharded.flush()
    for one, other in zip(whole.history.records, sharded.history.records, strict=True):
        assert (one.zeros, one.nonfinite, one.clipped) == (other.zeros, other.nonfinite, other.clipped)
        assert [one.norm, one.coef, one.largest] == pytest.approx([other.norm, other.coef, other.largest], nan_ok=True)
    for row, others in zip(whole.history.layers, sharded.history.layers, strict=True):
        assert [norm is None for norm in row] == [norm is None for norm in others]
        found = ([norm for norm in layers if norm is not None] for layers in (row, others))
        assert next(found) == pytest.approx(next(found), nan_ok=True)


def rows(rank: int) -> None:
    """AGC takes whole rows, wherever they are."""
    mesh = init_device_mesh("cpu", (2,))
    weight, grad = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.ones(7, 4)
    plain = nn.Parameter(weight)
    plain.grad = grad.clone()
    adaptive.adaptive_clip_grad_([plain])
    for where in (Shard(0), Replicate()):
        parameter = nn.Parameter(distribute_tensor(weight, mesh, [where]))
        parameter.grad = distribute_tensor(grad, mesh, [where])
        adaptive.adaptive_clip_grad_([parameter])
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.grad)
    parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
    parameter.grad = distribute_tensor(grad, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="AGC wants whole rows on each rank"):
        adaptive.adaptive_clip_grad_([parameter])


def test_a_state_is_that_of_one_process_and_moves_between_world_sizes() -> None:
    on_two_ranks(scenario)


def test_a_monitor_of_shards() -> None:
    on_two_ranks(recorded)


def test_agc_of_shards() -> None:
    on_two_ranks(rows)
