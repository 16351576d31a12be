"""DTensor parameters: each rank moves its shards as one process moves the whole; distributed checkpoints hold them."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fusedclip.optim import AdamW

from ..ranks import in_one_worker, on_two_ranks
from .test_checkpoints import same_bits

pytestmark = in_one_worker
OPTIONS: list[dict[str, Any]] = [{"moments": torch.bfloat16}, {"master": "split"}, {"master": "fp32", "amsgrad": True}]


def stack() -> nn.Sequential:
    """Of odd sizes, so that shards are uneven and the last one's are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 1)).bfloat16()


def give_gradients(model: nn.Module, whole: nn.Module, step: int) -> None:
    """The same to both; `model` has DTensors."""
    generator = torch.Generator().manual_seed(step)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
        assert isinstance(p, DTensor)
        local: Any = q.grad.chunk(dist.get_world_size())
        local = local[dist.get_rank()] if dist.get_rank() < len(local) else q.grad[:0]
        p.grad = DTensor.from_local(
            local.clone(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )


def full(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same(ours: AdamW, model: nn.Module, theirs: AdamW, whole: nn.Module) -> None:
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(full(p.detach()), q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for name, value in ours.state[p].items():
            assert isinstance(value, DTensor) == (name != "step")
            assert same_bits(full(value), theirs.state[q][name])


def shards(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for number, options in enumerate(OPTIONS):
        model, whole = stack(), stack()
        fully_shard(model, mesh=mesh)
        ours, theirs = (
            AdamW(model.parameters(), max_norm=0.5, **options),
            AdamW(whole.parameters(), max_norm=0.5, **options),
        )
        for step in range(4):
            give_gradients(model, whole, step)
            ours.step()
            theirs.step()
            assert ours.total_norm is not None
            assert theirs.total_norm is not None
            torch.testing.assert_close(ours.total_norm, theirs.total_norm)
        assert_same(ours, model, theirs, whole)
        if "master" in options:
            p, q = next(model.parameters()), next(whole.parameters())
            assert torch.equal(full(ours.master_of(p)), theirs.master_of(q))

        other = stack()
        fully_shard(other, mesh=mesh)
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        resumed = AdamW(other.parameters(), max_norm=0.5, **options)
        whole_of_it = StateDictOptions(full_state_dict=number % 2 == 1)
        saved = copy.deepcopy(get_optimizer_state_dict(model, ours, options=whole_of_it))
        set_optimizer_state_dict(other, resumed, saved, options=whole_of_it)
        assert_same(resumed, other, theirs, whole)
        give_gradients(other, whole, 9)
        resumed.step()
        theirs.step()
        assert_same(resumed, other, theirs, whole)


def test_shards_and_distributed_checkpoints() -> None:
    on_two_ranks(shards)


def placements(rank: int) -> None:
    """A parameter and a gradient, each placed in every way."""
    mesh = init_device_mesh("cpu", (2,))
    ways: list[Any] = [Replicate(), Shard(0), Shard(1), Partial()]
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(3, 5, generator=generator) for _ in range(2))
    whole = nn.Parameter(values.clone())
    whole.grad = gradient.clone()
    theirs = AdamW([whole], max_norm=0.5)
    for _ in range(2):
        theirs.step()
    for way in ways[:3]:
        for other in ways:
            p = nn.Parameter(distribute_tensor(values.clone(), mesh, [way]))
            if other.is_partial():
                p.grad = DTensor.from_local(gradient / 2, mesh, [other], run_check=False)
            else:
                p.grad = distribute_tensor(gradient, mesh, [other])
            ours = AdamW([p], max_norm=0.5)
            for _ in range(2):
                ours.step()
            torch.testing.assert_close(full(p.detach()), whole.detach())
            torch.testing.assert_close(ours.total_norm, theirs.total_norm)
    p = nn.Parameter(DTensor.from_local(values.clone(), mesh, [Partial()], run_check=False))
    p.grad = DTensor.from_local(gradient, mesh, [Partial()], run_check=False)
    with pytest.raises(TypeError, match=r"one part of a sum, .*redistribute\(\)"):
        AdamW([p]).step()
    assert torch.equal(p.to_local(), values)


def test_placements() -> None:
    on_two_ranks(placements)


def tensor_parallel(rank: int) -> None:
    """A model in columns and rows, and with its replicated rest sharded besides."""
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.LayerNorm(5))
        model = parallelize_module(copy.deepcopy(whole), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        ours = AdamW(model.parameters(), lr=0.01, max_norm=0.3)
        theirs = torch.optim.AdamW(whole.parameters(), lr=0.01)
        for step in range(4):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            for one, optimizer in ((model, ours), (whole, theirs)):
                optimizer.zero_grad()
                (one(x) - x[:, :5]).pow(2).sum().backward()
            norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.3)
            ours.step()
            theirs.step()
            torch.testing.assert_close(ours.total_norm, norm, rtol=1e-4, atol=0)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-4, atol=1e-6)


def test_tensor_parallelism() -> None:
    on_two_ranks(tensor_parallel)


def skips(rank: int) -> None:
    """A NaN on one rank keeps all of them from stepping."""
    model = stack().float()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdamW(model.parameters(), max_norm=0.5, on_nonfinite="skip")
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    model(torch.ones(2, 5)).sum().backward()
    if rank == 0:
        next(model.parameters()).grad._local_tensor.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.total_norm is not None
    assert optimizer.total_norm.isnan()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), q)  # type: ignore[attr-defined]


def test_a_nan_on_one_rank_skips_the_step_on_all() -> None:
    on_two_ranks(skips)
