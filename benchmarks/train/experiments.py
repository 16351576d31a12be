"""The two training experiments: a GPT with torch's clip and with fusedclip's, an LSTM without clipping and with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedclip
from benchmarks.table import markdown
from benchmarks.train.models import GPT, LSTM
from benchmarks.train.pair import Clip, Run, largest_difference, seeded, train
from benchmarks.train.text import VOCABULARY, batches

GPT_BATCH, GPT_CONTEXT, GPT_RATE, GPT_MAX_NORM = 8, 128, 1e-3, 0.5
# Without warm-up AdamW amplifies a difference in the last bit to 0.09 within 160 steps; with it that stays near 1e-6.
GPT_WARM_UP = 20
# Plain SGD with a rate ten times above what this LSTM bears: its loss is beyond that of guessing within ten steps.
LSTM_BATCH, LSTM_LENGTH, LSTM_RATE, LSTM_MAX_NORM = 8, 512, 60.0, 0.1
# The loss of guessing all bytes alike. Learned means well below it, diverged above it.
GUESSING = math.log(VOCABULARY)
LEARNED = 0.6 * GUESSING
LAST = 20


def torch_clip(max_norm: float) -> Clip:
    return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def fused_clip(max_norm: float) -> Clip:
    def clip(parameters: Sequence[nn.Parameter]) -> Tensor:
        return fusedclip.clip_grad_norm_(parameters, max_norm)

    return clip


def gpt(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """The same GPT twice; what differs is the rounding of the norm and the time."""

    def run(name: str, clip: Clip) -> Run:
        model = seeded(lambda: GPT(context=GPT_CONTEXT), seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=GPT_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / GPT_WARM_UP))
        return Run(name, model, optimizer, clip, schedule)

    runs = [run("torch", torch_clip(GPT_MAX_NORM)), run("fusedclip", fused_clip(GPT_MAX_NORM))]
    train(runs, batches(steps, GPT_BATCH, GPT_CONTEXT, seed), progress)
    sizes = [parameter.numel() for parameter in runs[0].model.parameters()]
    return {
        "tensors": len(sizes),
        "elements": sum(sizes),
        "max_norm": GPT_MAX_NORM,
        "clipped_steps": sum(norm > GPT_MAX_NORM for norm in runs[1].norms),
        "largest_difference": largest_difference(runs[0].losses, runs[1].losses),
        "runs": [run.result() for run in runs],
    }


def gpt_summary(result: dict[str, Any]) -> str:
    header = ["GPT, clipped by", "first loss", "last loss", "step", "clipping", "share of the step"]
    rows = [
        [
            run["name"],
            *(f"{loss:.4f}" for loss in (run["losses"][0], final(run["losses"]))),
            *(f"{run['step_ms']:.1f} ms", f"{run['clip_ms'] * 1e3:.0f} us", f"{run['clip_share']:.2%}"),
        ]
        for run in result["runs"]
    ]
    return (
        f"{markdown(header, rows)}\n{result['elements']:,} elements in {result['tensors']} tensors; clipped in "
        f"{result['clipped_steps']} of {len(result['runs'][0]['losses'])} steps; largest difference of the two loss "
        f"curves: {result['largest_difference']:.2g}"
    )


def lstm(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """The same LSTM twice with a rate that is far too high, without clipping (the norm measured) and with it."""

    def run(name: str, max_norm: float) -> Run:
        model = seeded(LSTM, seed)
        return Run(name, model, torch.optim.SGD(model.parameters(), lr=LSTM_RATE), fused_clip(max_norm))

    runs = [run("not clipped", math.inf), run("fusedclip", LSTM_MAX_NORM)]
    train(runs, batches(steps, LSTM_BATCH, LSTM_LENGTH, seed), progress)
    results = [one.result() | {"outcome": outcome(one.losses)} for one in runs]
    return {"max_norm": LSTM_MAX_NORM, "learning_rate": LSTM_RATE, "length": LSTM_LENGTH, "runs": results}


def lstm_summary(result: dict[str, Any]) -> str:
    header = ["LSTM, clipped by", "first loss", "highest loss", "last loss", "highest norm", "outcome"]
    rows = [
        [
            run["name"],
            *(f"{loss:.2f}" for loss in (run["losses"][0], max(run["losses"]), final(run["losses"]))),
            *(f"{max(run['norms']):.2g}", run["outcome"]),
        ]
        for run in result["runs"]
    ]
    return (
        f"{markdown(header, rows)}\n{len(result['runs'][0]['losses'])} steps of SGD with rate "
        f"{result['learning_rate']:g} over sequences of {result['length']} bytes; guessing all bytes alike is "
        f"{GUESSING:.2f}: above it is diverged, below {LEARNED:.2f} is learned"
    )


def final(losses: Sequence[float]) -> float:
    """The mean of the last steps; not a number if any of them isn't."""
    return statistics.fmean(losses[-LAST:])


def outcome(losses: Sequence[float]) -> str:
    """What a loss curve says about the run."""
    loss = final(losses)
    if not loss <= GUESSING:  # NaN too
        return "diverged"
    return "learned" if loss < LEARNED else "neither diverged nor learned"


@dataclass(frozen=True)
class Experiment:
    steps: int
    run: Callable[[int, int, Callable[[], object]], dict[str, Any]]
    """Of seed, steps, and what to call after each; two runs and what they have in common."""
    summary: Callable[[dict[str, Any]], str]


EXPERIMENTS = {"gpt": Experiment(320, gpt, gpt_summary), "lstm": Experiment(200, lstm, lstm_summary)}


def to_tensorboard(folder: Path, training: dict[str, Any]) -> None:
    """The curves of all runs as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    for experiment, result in training.items():
        for run in result["runs"]:
            with SummaryWriter(folder / f"{experiment}-{run['name'].replace(' ', '-')}") as writer:
                for tag in ("losses", "norms"):
                    for step, value in enumerate(run[tag]):
                        writer.add_scalar(tag, value, step)
