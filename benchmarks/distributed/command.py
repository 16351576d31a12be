"""`python -m benchmarks distributed`: starts the processes, prints the tables, keeps the result."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, table
from benchmarks.distributed import model
from benchmarks.distributed.contenders import FLOOR
from benchmarks.distributed.worker import Job, Measurement, run

COUNTS = (200, 1000)
SCALING = (1, 2, 4, 8)
SCALING_COUNT = 200
BARS = {200: 5.0, 1000: 10.0}  # torch's time over ours, on two ranks
TORCH, OURS = "torch, DTensors", "fusedclip"


def compare(nproc: int, seconds: float, seed: int, out: Path | None) -> int:
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= nproc else "gloo"
    print(f"FSDP2's gradients, 4 KiB per parameter and rank, {backend}; microseconds on the slowest rank, clipped\n")
    pairs = {count: measure(count, COUNTS, seconds, seed, backend) for count in sorted({2, nproc} - {1})}
    for rows in pairs.values():
        print(contenders(rows), end="\n\n")
    weak: list[Measurement] = []
    for ranks in SCALING:
        if ranks <= max(nproc, 2):
            weak += _some(pairs, ranks, seconds, seed, backend)
    print(f"Weak scaling, {SCALING_COUNT} parameters ({torch.multiprocessing.cpu_count()} processors here):\n")
    print(scaling(weak), end="\n\n")
    print(on_paper(pairs[2]), end="\n\n")
    verdicts = [bar(pairs[2], count, least) for count, least in BARS.items()]
    print("\n".join(f"{text}: {'holds' if holds else 'DOES NOT HOLD'}" for text, holds in verdicts))
    if out is not None:
        kept = [asdict(row) for several in pairs.values() for row in several]
        result = {"environment": environment.describe(torch.device("cpu")), "backend": backend, "seed": seed}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**result, "rows": kept, "weak_scaling": [asdict(row) for row in weak]}, indent=1))
        print(f"saved {out}")
    return int(not all(holds for _, holds in verdicts))


def _some(
    pairs: dict[int, list[Measurement]], ranks: int, seconds: float, seed: int, backend: str
) -> list[Measurement]:
    if ranks in pairs:
        return [row for row in pairs[ranks] if row.parameters == SCALING_COUNT]
    return measure(ranks, (SCALING_COUNT,), seconds, seed, backend)


def measure(ranks: int, counts: tuple[int, ...], seconds: float, seed: int, backend: str) -> list[Measurement]:
    """In processes of its own."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(counts, seconds, seed, backend, str(Path(folder) / "store"))
        answers: SimpleQueue[Any] = context.SimpleQueue()
        processes = [context.Process(target=_rank, args=(r, ranks, job, answers), daemon=True) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if answers.empty():  # the first rank answers last of all: what fails then, at an exit, has no say in it
            raise ValueError(f"a rank failed: exit codes {codes}")
        if any(codes):
            print(f"(a rank failed after it had measured: exit codes {codes})")
        found: list[dict[str, Any]] = answers.get()
        return [Measurement(**row) for row in found]


def _rank(rank: int, ranks: int, job: Job, answers: SimpleQueue[Any]) -> None:
    results: list[Measurement] = []
    run(rank, ranks, job, results)
    if rank == 0:
        answers.put([asdict(row) for row in results])


def contenders(rows: list[Measurement]) -> str:
    header = ["ranks", "parameters", "contender", "p20", "median", "p80", "all-reduces", "against torch", "error"]
    lines = []
    for row in rows:
        torch_time = _time(rows, TORCH, row.parameters)
        ratio = "" if row.contender == FLOOR else f"{torch_time / row.median:.1f}x"
        times = [f"{us:,.0f}" for us in (row.p20, row.median, row.p80)]
        error = "" if row.contender == FLOOR else f"{row.error:.0e}"
        lines.append([str(row.ranks), str(row.parameters), row.contender, *times, str(row.collectives), ratio, error])
    return table.markdown(header, lines)


def scaling(rows: list[Measurement]) -> str:
    names = list(dict.fromkeys(row.contender for row in rows))
    ranks = sorted({row.ranks for row in rows})
    time_of = {(row.contender, row.ranks): row.median for row in rows}
    lines = [[name, *(f"{time_of[name, count]:,.0f}" for count in ranks)] for name in names]
    return table.markdown(["us", *(f"{count} ranks" for count in ranks)], lines)


def on_paper(rows: list[Measurement], parameters: int = 5000) -> str:
    few, many = COUNTS
    floor = _time(rows, FLOOR, few)
    collectives = {row.contender: row.collectives for row in rows}
    hosts = [
        model.fitted(name, (few, _time(rows, name, few)), (many, _time(rows, name, many)), floor, collectives[name])
        for name in (TORCH, "torch, local tensors", OURS)
    ]
    lines = [
        [host.name, f"{host.each:.2f}", *(f"{host.total(parameters, ranks):,.0f}" for ranks in model.RANKS)]
        for host in hosts
    ]
    lines.append(["of that one all-reduce", "0", *(f"{model.all_reduce(ranks):,.0f}" for ranks in model.RANKS)])
    header = ["us", "per parameter", *(f"{ranks:,} ranks" for ranks in model.RANKS)]
    return (
        f"On paper: {parameters:,} parameters, host times as measured on two ranks, all-reduces by the alpha-beta\n"
        f"model, 2 ceil(log2 P) steps of {model.ALPHA_US:.0f} us. Only that grows with the ranks, not the vector.\n\n"
        + table.markdown(header, lines)
    )


def bar(rows: list[Measurement], count: int, least: float) -> tuple[str, bool]:
    ratio = _time(rows, TORCH, count) / _time(rows, OURS, count)
    return (
        f"{count:,} parameters on 2 ranks: {ratio:.1f}x less time than torch, at least {least:.0f}x asked for",
        ratio >= least,
    )


def _time(rows: list[Measurement], contender: str, parameters: int) -> float:
    return next(row.median for row in rows if row.contender == contender and row.parameters == parameters)
