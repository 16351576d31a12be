"""Runs scenarios in a few gloo processes, which live as long as the tests do: starting one takes seconds.

They are forks of one server that has torch imported and has done nothing with it. Tests that are marked `in_one_worker`
share them under `pytest -n`, too.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest
import torch
import torch.distributed as dist

in_one_worker = pytest.mark.xdist_group("ranks")
Scenario = Callable[[int], None]
SECONDS = 120.0  # for a scenario, on a busy machine
LEFT = "left"  # what a rank answers that will not serve again: its group is broken, as was asked
IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "hypothesis", "pytest", "numpy"]
_ranks: list[tuple[ForkServerProcess, Connection]] = []


def on_two_ranks(scenario: Scenario) -> None:
    on_ranks(2, scenario)


def on_ranks(count: int, scenario: Scenario, seconds: float = SECONDS / 2) -> None:
    """`scenario(rank)` on all ranks of a new group; raises what any of them raises.

    A collective that some rank does not take part in ends after so many seconds.
    """
    _ranks[:] = _ranks if all(process.is_alive() for process, _ in _ranks) else []
    _ranks.extend(_start(rank) for rank in range(len(_ranks), count))
    with tempfile.TemporaryDirectory() as folder:
        for _, pipe in _ranks[:count]:
            pipe.send((scenario, os.path.join(folder, "store"), count, seconds))
        answers: list[str | None] = []
        waiting = [pipe for _, pipe in _ranks[:count]]
        while waiting and not _failures(answers):  # the others of one that failed may wait for it for ever
            ready = connection.wait(waiting, SECONDS)
            answers += [_answer(pipe) for pipe in waiting if pipe in ready] or [f"no answer in {SECONDS} s"]
            waiting = [pipe for pipe in waiting if pipe not in ready]
    if any(answers):
        for process, _ in _ranks:
            process.kill()
        _ranks.clear()
    if _failures(answers):
        raise AssertionError("\n".join(_failures(answers)))


def _failures(answers: list[str | None]) -> list[str]:
    return [answer for answer in answers if answer not in (None, LEFT)]


def _answer(pipe: Connection) -> str | None:
    try:
        return pipe.recv()
    except EOFError:
        return "a rank has died"


def _start(rank: int) -> tuple[ForkServerProcess, Connection]:
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(rank, there), daemon=True)  # killed at the end
    process.start()
    there.close()  # or nobody would see the end of it
    return process, here


def _serve(rank: int, pipe: Connection) -> None:
    """Answers each scenario with what it raised, or None."""
    torch.set_num_threads(1)
    while True:
        scenario, store, count, seconds = pipe.recv()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=seconds),
            )
            scenario(rank)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send(None)
        except SystemExit:  # the scenario has broken its group, and knows
            pipe.send(LEFT)
            return
        except BaseException:
            pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
            raise
