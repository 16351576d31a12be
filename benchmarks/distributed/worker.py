"""One rank: FSDP2's parameters with gradients of a backward pass, clipped by each contender in turns."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.distributed.contenders import CLIPS, FLOOR, counted

CALLS = 5  # in a row: after the first the norm is the limit, and 1e-6 in the coefficient has every call write all
SIDE = 32  # a parameter is [SIDE * ranks, SIDE]: every rank holds 4 KiB of each, whatever their number


class Job(NamedTuple):
    counts: tuple[int, ...]  # of parameters
    seconds: float  # for each of them
    seed: int
    backend: str
    store: str


@dataclass
class Measurement:
    """Of one contender: microseconds of a call on the slowest rank, and what it communicates."""

    contender: str
    parameters: int
    ranks: int
    p20: float
    median: float
    p80: float
    collectives: int
    error: float  # of the norm, relative to fp64


class Stack(nn.Module):
    """As many parameters as are asked for, each used once."""

    def __init__(self, count: int, rows: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(rows, SIDE)) for _ in range(count))

    def forward(self) -> Tensor:
        return torch.stack([weight.sin().sum() for weight in self.weights]).sum()


def run(rank: int, ranks: int, job: Job, results: list[Measurement]) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if job.backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        job.backend, init_method=f"file://{job.store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    for count in job.counts:
        measured = measure(count, ranks, job, device)
        if rank == 0:
            results.extend(measured)
    dist.barrier()  # nobody is still at work where another one leaves
    dist.destroy_process_group()


def measure(count: int, ranks: int, job: Job, device: torch.device) -> list[Measurement]:
    torch.manual_seed(job.seed)
    stack = Stack(count, SIDE * ranks).to(device)
    fully_shard(stack, mesh=init_device_mesh(device.type, (ranks,)))
    stack().backward()
    parameters = list(stack.parameters())
    local = [parameter.grad._local_tensor for parameter in parameters]  # type: ignore[union-attr]
    square = torch.stack([one.double().square().sum() for one in local]).sum()
    dist.all_reduce(square)
    exact = math.sqrt(square.item())
    original = [one.clone() for one in local]
    errors, collectives = {}, {}
    for name, clip in CLIPS.items():
        with counted() as made:
            norm = clip(parameters, 2 * exact)
        errors[name] = abs(norm.item() / exact - 1)
        collectives[name] = len(made)
    samples: dict[str, list[float]] = {name: [] for name in CLIPS}
    for _ in range(rounds(parameters, exact, job.seconds, device)):
        for name, clip in CLIPS.items():
            torch._foreach_copy_(local, original)
            clip(parameters, exact / 2)  # no contender meets the caches, or the other ranks, as the last one left them
            synchronize(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                clip(parameters, exact / 2)
            synchronize(device)
            samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
    slowest = torch.tensor([samples[name] for name in CLIPS], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    quantiles = np.quantile(slowest.cpu().numpy(), [0.2, 0.5, 0.8], axis=1).T
    return [
        Measurement(name, count, ranks, low, middle, high, collectives[name], 0.0 if name == FLOOR else errors[name])
        for name, (low, middle, high) in zip(CLIPS, quantiles.tolist(), strict=True)
    ]


def rounds(parameters: list[nn.Parameter], exact: float, seconds: float, device: torch.device) -> int:
    """As many as fit, the same on all ranks."""
    start = time.perf_counter()
    for _ in range(3):
        for clip in CLIPS.values():
            clip(parameters, 2 * exact)
    fit = torch.tensor(max(7, int(seconds / ((time.perf_counter() - start) / 3 * (CALLS + 1)))), device=device)
    dist.all_reduce(fit, dist.ReduceOp.MIN)
    return int(fit.item())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
