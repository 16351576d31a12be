"""The two training experiments: a GPT with torch's clip and with fusedclip's, an LSTM without clipping and with it."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import fusedclip
from benchmarks.table import markdown
from benchmarks.train import adaptive
from benchmarks.train.models import GPT, LSTM
from benchmarks.train.pair import Clip, Run, largest_difference, train
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
STEPS = {"gpt": 320, "lstm": 200, "adaptive": 300}


def run(name: str, seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """One of the experiments; two runs and what they have in common. `progress` is called after each step."""
    return {"gpt": gpt, "lstm": lstm, "adaptive": adaptive.adaptive}[name](seed, steps, progress)


def gpt(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """The same GPT twice; what differs is the rounding of the norm and the time."""

    def one(name: str, clip: Clip) -> Run:
        torch.manual_seed(seed)
        model = GPT(GPT_CONTEXT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=GPT_RATE)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / GPT_WARM_UP, total_iters=GPT_WARM_UP - 1)
        optimizer.register_step_post_hook(lambda *_: warm_up.step())
        return Run(name, model, optimizer, clip, GPT_MAX_NORM)

    runs = [one("torch", clip_grad_norm_), one("fusedclip", fusedclip.clip_grad_norm_)]
    train(runs, batches(steps, GPT_BATCH, GPT_CONTEXT, seed), progress)
    return {
        "tensors": len(runs[0].parameters),
        "elements": sum(parameter.numel() for parameter in runs[0].parameters),
        "max_norm": GPT_MAX_NORM,
        "clipped_steps": sum(norm > GPT_MAX_NORM for norm in runs[1].norms),
        "largest_difference": largest_difference(runs[0].losses, runs[1].losses),
        "runs": [run.result() for run in runs],
    }


def lstm(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """The same LSTM twice with a rate that is far too high, without clipping (the norm measured) and with it."""

    def one(name: str, max_norm: float) -> Run:
        torch.manual_seed(seed)
        model = LSTM()
        optimizer = torch.optim.SGD(model.parameters(), lr=LSTM_RATE)
        return Run(name, model, optimizer, fusedclip.clip_grad_norm_, max_norm)

    runs = [one("not clipped", math.inf), one("fusedclip", LSTM_MAX_NORM)]
    train(runs, batches(steps, LSTM_BATCH, LSTM_LENGTH, seed), progress)
    results = [run.result() | {"outcome": outcome(run.losses)} for run in runs]
    return {"max_norm": LSTM_MAX_NORM, "learning_rate": LSTM_RATE, "length": LSTM_LENGTH, "runs": results}


def summary(name: str, result: dict[str, Any]) -> str:
    """A line per run, and what they have in common."""
    if name == "adaptive":
        return adaptive.summary(result)
    steps = len(result["runs"][0]["losses"])
    if name == "lstm":
        below = (
            f"{steps} steps of SGD with rate {result['learning_rate']:g} over sequences of {result['length']} bytes; "
            f"guessing all bytes alike is {GUESSING:.2f}: above it is diverged, below {LEARNED:.2f} is learned"
        )
    else:
        below = (
            f"{result['elements']:,} elements in {result['tensors']} tensors; clipped in {result['clipped_steps']} of "
            f"{steps} steps; largest difference of the two loss curves: {result['largest_difference']:.2g}"
        )
    header = ["clipped by", "first loss", "highest loss", "last loss", "highest norm", "step", "clipping", "share", ""]
    return f"{markdown(header, [_line(one) for one in result['runs']])}\n{below}"


def _line(one: dict[str, Any]) -> list[str]:
    losses = [f"{loss:.4g}" for loss in (one["losses"][0], max(one["losses"]), final(one["losses"]))]
    times = [f"{one['step_ms']:.1f} ms", f"{one['clip_ms'] * 1e3:.0f} us", f"{one['clip_share']:.2%}"]
    return [one["name"], *losses, f"{max(one['norms']):.2g}", *times, one.get("outcome", "")]


def final(losses: Sequence[float]) -> float:
    """The mean of the last steps; not a number if any of them isn't."""
    return statistics.fmean(losses[-LAST:])


def outcome(losses: Sequence[float]) -> str:
    """What a loss curve says about the run."""
    loss = final(losses)
    if not loss <= GUESSING:  # NaN too
        return "diverged"
    return "learned" if loss < LEARNED else "neither diverged nor learned"


def to_tensorboard(folder: Path, training: dict[str, Any]) -> None:
    """The curves of all runs as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    for experiment, result in training.items():
        for run in result["runs"]:
            with SummaryWriter(folder / f"{experiment}-{run['name'].replace(' ', '-')}") as writer:
                for tag in ("losses", "norms"):
                    for step, value in enumerate(run[tag]):
                        writer.add_scalar(tag, value, step)
