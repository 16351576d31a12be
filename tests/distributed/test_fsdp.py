"""torch's own wrappers: FSDP2, alone and over tensor parallelism; FSDP1; patch_torch() under all of them."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import fusedclip

from .. import oracle, tiny_gpt
from ..ranks import in_one_worker, on_ranks
from .shards import all_reduces, assert_clipped, copies, local, same_bits_on_all_ranks

pytestmark = in_one_worker
ORDERS = [2.0, 1.0, 3.0, math.inf, 0.0]


def stack() -> nn.Sequential:
    """Of odd sizes, so that shards are uneven and the last one's are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 1))


def gradients_of_one_process(inputs: Tensor) -> list[Tensor]:
    model = stack()
    model(inputs).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def fsdp2(rank: int) -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    full = gradients_of_one_process(inputs)
    mesh = init_device_mesh("cpu", (2,))
    for p in ORDERS:
        model = stack()
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(inputs.chunk(2)[rank]).square().mean().backward()
        params = list(model.parameters())
        before, expected = copies(params), oracle.norm(full, p)
        with all_reduces() as made:
            norm = fusedclip.clip_grad_norm_(model.parameters(), expected / 2, p)
        assert made == ["max" if math.isinf(p) else "sum"]
        oracle.assert_close(norm, expected, 3e-6)
        same_bits_on_all_ranks(norm)
        assert_clipped(params, before, oracle.coefficient(float(norm), expected / 2))


def fsdp2_over_tp(rank: int) -> None:
    """The feed-forward of a transformer, with a norm in sequence parallel: strided shards beside replicated ones."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    inputs = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).double()
    reference = copy.deepcopy(whole)
    reference(inputs).square().mean().backward()
    full = [q.grad for q in reference.parameters() if q.grad is not None]
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    from torch.distributed.tensor import Shard

    for wrapped in (False, True):
        model = copy.deepcopy(whole)
        plan = {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "3": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(model, world["tp"], plan)
        mine = inputs
        if wrapped:
            fully_shard(model, mesh=world["dp"])
            mine = inputs.chunk(2)[rank // 2]
        for p in ORDERS:
            for q in model.parameters():
                q.grad = None
            # SequenceParallel() takes a tensor for this rank's part of the sequence, and leaves the loss to be so, too
            out = model(mine.chunk(2, dim=1)[rank % 2].contiguous())
            (local(out).square().sum() / mine.numel()).backward()
            params = list(model.parameters())
            expected = oracle.norm(full, p)
            before = copies(params)
            placements = {str(q.grad.placements) for q in params if isinstance(q.grad, DTensor)}
            with all_reduces() as made:
                norm = fusedclip.clip_grad_norm_(params, expected / 2, p)
            oracle.assert_close(norm, expected, 1e-9)
            same_bits_on_all_ranks(norm)
            assert_clipped(params, before, oracle.coefficient(expected, expected / 2))
            assert any("_StridedShard" in one for one in placements) == wrapped
            assert any("Partial" in one for one in placements) != wrapped, placements
            assert len(made) - made.count("parts of gradients") in (1, 2), made


def train(wrap: bool, rank: int, steps: int = 12) -> list[float]:
    """A small GPT's losses; the batch is split between the ranks if it is wrapped."""
    gpt = tiny_gpt.model(torch.float64)
    if wrap:
        fully_shard(gpt, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for tokens in tiny_gpt.batches(steps):
        optimizer.zero_grad()
        loss = tiny_gpt.loss_of(gpt, tokens.chunk(2)[rank] if wrap else tokens)
        loss.backward()
        fusedclip.clip_grad_norm_(gpt.parameters(), 0.5)
        optimizer.step()
        loss = loss.detach().clone()
        if wrap:
            dist.all_reduce(loss, dist.ReduceOp.AVG if False else dist.ReduceOp.SUM)
            loss /= 2
        losses.append(loss.item())
    return losses


def a_small_gpt_trains_as_in_one_process(rank: int) -> None:
    alone, sharded = train(False, rank), train(True, rank)
    assert sharded == pytest.approx(alone, rel=1e-9)
    assert alone[-1] < alone[0] - 0.2


def patched_functions_return_what_torch_does(rank: int) -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    full = gradients_of_one_process(inputs)
    expected = oracle.norm(full)
    mesh = init_device_mesh("cpu", (2,))
    model = stack()
    fully_shard(model, mesh=mesh)
    model(inputs.chunk(2)[rank]).square().mean().backward()
    params = list(model.parameters())
    with fusedclip.patch_torch():
        with CommDebugMode() as comms:
            norm = clip_grad_norm_(model.parameters(), math.inf)
        assert comms.get_comm_counts()[torch.ops.c10d_functional.all_reduce] == 1
        assert isinstance(norm, DTensor)
        assert norm.device_mesh == mesh
        assert norm.placements[0].is_replicate()
        oracle.assert_close(norm.full_tensor(), expected, 3e-6)
        with CommDebugMode() as comms:
            again = norm.full_tensor()
            clip_grads_with_norm_(params, expected / 2, norm)
            clip_grad_value_(params, 1e3)
        assert not comms.get_comm_counts()
        total = get_total_norm([q.grad for q in params if q.grad is not None])
        assert isinstance(total, DTensor)
        oracle.assert_close(total.full_tensor(), expected / 2, 3e-6)
        plain = clip_grad_norm_(stack().parameters(), 1.0)  # no gradients
        assert type(plain) is Tensor
        assert plain == 0
        for q in params:
            q.grad = None
        none = clip_grad_norm_(params, 1.0)
        assert isinstance(none, DTensor)
        assert none.full_tensor() == 0
    assert float(again) == float(norm.full_tensor())


def fsdp1(rank: int) -> None:
    """Its parameters are plain shards: group= makes their norm that of the whole."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    full = gradients_of_one_process(inputs)
    for original in (True, False):
        model = FullyShardedDataParallel(stack(), device_id=torch.device("cpu"), use_orig_params=original)
        model(inputs.chunk(2)[rank]).square().mean().backward()
        norm = fusedclip.clip_grad_norm_(model.parameters(), math.inf, group=model.process_group)
        oracle.assert_close(norm, oracle.norm(full), 3e-6)
        same_bits_on_all_ranks(norm)
        oracle.assert_close(model.clip_grad_norm_(math.inf), oracle.norm(full), 3e-6)
    model = FullyShardedDataParallel(
        stack(), device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True
    )
    model(inputs.chunk(2)[rank]).square().mean().backward()
    assert isinstance(model, FullyShardedDataParallel)
    inflated = fusedclip.clip_grad_norm_(model.parameters(), math.inf, group=model.process_group)
    oracle.assert_close(inflated, math.sqrt(2) * oracle.norm(full), 3e-6)  # as documented: replicas are not shards
    oracle.assert_close(fusedclip.clip_grad_norm_(model.parameters(), math.inf), oracle.norm(full), 3e-6)


@pytest.mark.parametrize(
    ("count", "scenario"),
    [
        (2, fsdp2),
        (2, a_small_gpt_trains_as_in_one_process),
        (2, patched_functions_return_what_torch_does),
        (2, fsdp1),
        (4, fsdp2_over_tp),
    ],
)
def test_fsdp(count: int, scenario: Callable[[int], None]) -> None:
    on_ranks(count, scenario)
