"""DTensor parameters: each rank moves its shards as one process moves the whole; distributed checkpoints hold them."""

import copy
from typing import Any

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
from torch.distributed.tensor import DTensor

from fusedclip.optim import AdamW

from ..ranks import on_two_ranks
from .test_checkpoints import same_bits

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
