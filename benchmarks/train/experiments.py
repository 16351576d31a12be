"""The training experiments; of the main job's two, a GPT with torch's clip and with fusedclip's, an LSTM without
clipping and with it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import fusedclip
from benchmarks.table import markdown
from benchmarks.train import adaptive, optimizers, pair
from benchmarks.train.models import LSTM, VOCABULARY, batches
from benchmarks.train.pair import Run, final, largest_difference, train

GPT_BATCH, GPT_CONTEXT, GPT_RATE, GPT_MAX_NORM = 8, 128, 1e-3, 0.5
# Plain SGD with a rate ten times above what this LSTM bears: its loss is beyond that of guessing within ten steps.
LSTM_BATCH, LSTM_LENGTH, LSTM_RATE, LSTM_MAX_NORM = 8, 512, 60.0, 0.1
# The loss of guessing all bytes alike. Learned means well below it, diverged above it.
GUESSING = math.log(VOCABULARY)
LEARNED = 0.6 * GUESSING
Result = dict[str, Any]


def gpt(seed: int, steps: int, progress: Callable[[], object]) -> Result:
    """The same GPT twice; what differs is the rounding of the norm and the time."""
    optimizer = partial(torch.optim.AdamW, lr=GPT_RATE)
    clips = {"torch": clip_grad_norm_, "fusedclip": fusedclip.clip_grad_norm_}.items()
    runs = [Run(name, *pair.gpt(seed, optimizer, context=GPT_CONTEXT), clip, GPT_MAX_NORM) for name, clip in clips]
    train(runs, batches(steps, GPT_BATCH, GPT_CONTEXT, seed), progress)
    return {
        "tensors": len(runs[0].parameters),
        "elements": sum(parameter.numel() for parameter in runs[0].parameters),
        "max_norm": GPT_MAX_NORM,
        "clipped_steps": sum(norm > GPT_MAX_NORM for norm in runs[1].norms),
        "largest_difference": largest_difference(runs[0].losses, runs[1].losses),
        "runs": [run.result() for run in runs],
    }


def gpt_summary(result: Result) -> str:
    return (
        f"{_table(result)}\n{result['elements']:,} elements in {result['tensors']} tensors; clipped in "
        f"{result['clipped_steps']} of {len(result['runs'][0]['losses'])} steps; largest difference of the two loss "
        f"curves: {result['largest_difference']:.2g}"
    )


def lstm(seed: int, steps: int, progress: Callable[[], object]) -> Result:
    """The same LSTM twice with a rate that is far too high, without clipping (the norm measured) and with it."""
    runs = []
    for name, max_norm in {"not clipped": math.inf, "fusedclip": LSTM_MAX_NORM}.items():
        torch.manual_seed(seed)
        model = LSTM()
        optimizer = torch.optim.SGD(model.parameters(), lr=LSTM_RATE)
        runs.append(Run(name, model, optimizer, fusedclip.clip_grad_norm_, max_norm))
    train(runs, batches(steps, LSTM_BATCH, LSTM_LENGTH, seed), progress)
    results = [run.result() | {"outcome": outcome(run.losses)} for run in runs]
    return {"max_norm": LSTM_MAX_NORM, "learning_rate": LSTM_RATE, "length": LSTM_LENGTH, "runs": results}


def lstm_summary(result: Result) -> str:
    return (
        f"{_table(result)}\n{len(result['runs'][0]['losses'])} steps of SGD with rate {result['learning_rate']:g} over "
        f"sequences of {result['length']} bytes; guessing all bytes alike is {GUESSING:.2f}: above it is diverged, "
        f"below {LEARNED:.2f} is learned"
    )


def _table(result: Result) -> str:
    header = ["clipped by", "first loss", "highest loss", "last loss", "highest norm", "step", "clipping", "share", ""]
    lines = []
    for one in result["runs"]:
        losses = [f"{loss:.4g}" for loss in (one["losses"][0], max(one["losses"]), final(one["losses"]))]
        times = [f"{one['step_ms']:.1f} ms", f"{one['clip_ms'] * 1e3:.0f} us", f"{one['clip_share']:.2%}"]
        lines.append([one["name"], *losses, f"{max(one['norms']):.2g}", *times, one.get("outcome", "")])
    return markdown(header, lines)


def outcome(losses: Sequence[float]) -> str:
    """What a loss curve says about the run."""
    loss = final(losses)
    if not loss <= GUESSING:  # NaN too
        return "diverged"
    return "learned" if loss < LEARNED else "neither diverged nor learned"


# How many steps; what is run, with a seed, that number and a function to call after each; a table of what came of it.
EXPERIMENTS: dict[str, tuple[int, Callable[[int, int, Callable[[], object]], Result], Callable[[Result], str]]] = {
    "gpt": (320, gpt, gpt_summary),
    "lstm": (200, lstm, lstm_summary),
    "adaptive": (300, adaptive.adaptive, adaptive.summary),
    "optimizers": (300, optimizers.optimizers, optimizers.summary),
}


def to_tensorboard(folder: Path, training: Result) -> None:
    """The curves of all runs as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    for experiment, result in training.items():
        for run in result["runs"]:
            with SummaryWriter(folder / f"{experiment}-{run['name'].replace(' ', '-')}") as writer:
                for tag in ("losses", "norms"):
                    for step, value in enumerate(run[tag]):
                        writer.add_scalar(tag, value, step)
