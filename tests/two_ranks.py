"""Runs a scenario in two gloo processes."""

import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(scenario: Callable[[int], None]) -> None:
    """`scenario(rank)` on both ranks of a new group; raises what either of them raises."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_main, (scenario, os.path.join(folder, "store")), nprocs=2, start_method="spawn")


def _main(rank: int, scenario: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    scenario(rank)
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter's exit is left out: in one run of eight it aborts in a thread of torch's ("terminate called
    # without an active exception"), after the scenario has passed.
    os._exit(0)
