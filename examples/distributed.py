"""Clipping a model that is cut into two pipeline stages, each sharded by FSDP2, with an embedding that both stages tie.

    torchrun --nproc-per-node 4 examples/distributed.py

Every step prints the norm of the whole model, which is the same on all ranks, and which the single-process model has.
The pipeline's schedule is left out, so that what clipping needs is all there is: each rank runs the whole model in turn
and keeps the gradients of its own stage.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedclip

VOCABULARY, WIDTH, STEPS = 64, 32, 5


class Stage(nn.Module):
    """Half of the model. The first embeds tokens, the last uses the same weight to tell the next one."""

    def __init__(self, index: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.1)
        torch.manual_seed(1 + index)
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        x = F.embedding(x, self.embedding) if self.index == 0 else x
        x = x + self.block(x)
        return x if self.index == 0 else x @ self.embedding.T


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("pp", "dp"))
    across_stages, index = mesh.get_group("pp"), mesh.get_local_rank("pp")
    stages = [fully_shard(Stage(i), mesh=mesh["dp"]) for i in range(2)]
    mine = stages[index]
    # After the sum below both stages hold the whole gradient of the embedding: the first one counts it.
    tied = {mine.embedding} if index == 1 else None
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2)
    torch.manual_seed(10 + mesh.get_local_rank("dp"))
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (8, 9))
        loss = F.cross_entropy(stages[1](stages[0](tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        dist.all_reduce(mine.embedding.grad.to_local(), group=across_stages)
        norm = fusedclip.clip_grad_norm_(mine.parameters(), max_norm=0.5, group=across_stages, counted_elsewhere=tied)
        optimizer.step()
        for stage in stages:
            stage.zero_grad()
        share_steps(stages, index, across_stages)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.4f}, norm {norm:.6f}", flush=True)
    norms = [torch.empty(()) for _ in range(dist.get_world_size())]
    dist.all_gather(norms, norm)
    assert all(torch.equal(norm, other) for other in norms), norms
    if dist.get_rank() == 0:
        print(f"the same norm on all {len(norms)} ranks")
    dist.destroy_process_group()


def share_steps(stages: list[Stage], index: int, group: dist.ProcessGroup) -> None:
    """Each rank plays both stages here: what the other one has learned comes from the rank that has it."""
    for i, stage in enumerate(stages):
        for parameter in stage.parameters():
            dist.broadcast(parameter.to_local().detach(), group=group, group_src=i)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("run it by torchrun --nproc-per-node 4 examples/distributed.py")
    main()
