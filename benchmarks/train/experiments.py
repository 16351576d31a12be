"""The two training experiments: a GPT with torch's clip and with fusedclip's, an LSTM without clipping and with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.duel import Batches, Clip, Run, largest_difference, seeded, train
from benchmarks.train.models import GPT, LSTM
from benchmarks.train.text import VOCABULARY, batches

GPT_STEPS, GPT_BATCH, GPT_CONTEXT, GPT_RATE, GPT_MAX_NORM = 320, 8, 128, 1e-3, 0.5
# Without warm-up AdamW amplifies a difference in the last bit to 0.09 within 160 steps; with it that stays near 1e-6.
GPT_WARM_UP = 20
# Plain SGD with a rate ten times above what this LSTM bears: its loss is beyond that of guessing within ten steps.
LSTM_STEPS, LSTM_BATCH, LSTM_LENGTH, LSTM_RATE, LSTM_MAX_NORM = 200, 8, 512, 60.0, 0.1
# The loss of guessing all bytes alike. Learned means well below it, diverged above it.
GUESSING = math.log(VOCABULARY)
LEARNED = 0.6 * GUESSING
LAST = 20


def torch_clip(max_norm: float) -> Clip:
    return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def fused_clip(max_norm: float) -> Clip:
    import fusedclip

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
    model = runs[0].model
    return {
        "tensors": len(list(model.parameters())),
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        "max_norm": GPT_MAX_NORM,
        "clipped_steps": sum(norm > GPT_MAX_NORM for norm in runs[1].norms),
        "largest_difference": largest_difference(runs[0].losses, runs[1].losses),
        "runs": [run.summary() for run in runs],
    }


def lstm(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """The same LSTM twice with a rate that is far too high, without clipping and with it."""

    def run(name: str, clip: Clip | None) -> Run:
        model = seeded(LSTM, seed)
        return Run(name, model, torch.optim.SGD(model.parameters(), lr=LSTM_RATE), clip)

    runs = [run("not clipped", None), run("fusedclip", fused_clip(LSTM_MAX_NORM))]
    data: Batches = batches(steps, LSTM_BATCH, LSTM_LENGTH, seed)
    train(runs, data, progress)
    summaries = [one.summary() | {"outcome": outcome(one.losses)} for one in runs]
    return {"max_norm": LSTM_MAX_NORM, "learning_rate": LSTM_RATE, "length": LSTM_LENGTH, "runs": summaries}


def final(losses: Sequence[float]) -> float:
    """The mean of the last steps; not a number if any of them isn't."""
    return statistics.fmean(losses[-LAST:])


def outcome(losses: Sequence[float]) -> str:
    """What a loss curve says about the run."""
    loss = final(losses)
    if not loss <= GUESSING:  # NaN too
        return "diverged"
    return "learned" if loss < LEARNED else "neither diverged nor learned"
