"""What the training experiments found, in words for a terminal, and for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.table import markdown
from benchmarks.train.experiments import GUESSING, LEARNED, final


def gpt(result: dict[str, Any]) -> str:
    header = ["GPT, clipped by", "first loss", "last loss", "step", "clipping", "share of the step"]
    rows = [
        [
            run["name"],
            f"{run['losses'][0]:.4f}",
            f"{final(run['losses']):.4f}",
            f"{run['step_ms']:.1f} ms",
            f"{run['clip_ms'] * 1e3:.0f} us",
            f"{run['clip_share']:.2%}",
        ]
        for run in result["runs"]
    ]
    steps = len(result["runs"][0]["losses"])
    return (
        f"{markdown(header, rows)}\n"
        f"{result['elements']:,} elements in {result['tensors']} tensors; clipped in {result['clipped_steps']} of "
        f"{steps} steps; largest difference of the two loss curves: {result['largest_difference']:.2g}"
    )


def lstm(result: dict[str, Any]) -> str:
    header = ["LSTM, clipped by", "first loss", "highest loss", "last loss", "outcome"]
    rows = [
        [
            run["name"],
            f"{run['losses'][0]:.2f}",
            f"{max(run['losses']):.2f}",
            f"{final(run['losses']):.2f}",
            run["outcome"],
        ]
        for run in result["runs"]
    ]
    steps = len(result["runs"][0]["losses"])
    return (
        f"{markdown(header, rows)}\n"
        f"{steps} steps of SGD with rate {result['learning_rate']:g} over sequences of {result['length']} bytes; "
        f"guessing all bytes alike is {GUESSING:.2f}: above it is diverged, below {LEARNED:.2f} is learned"
    )


def to_tensorboard(folder: Path, training: dict[str, Any]) -> None:
    """The curves of all runs as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter

    for name, run in _runs(training):
        with SummaryWriter(folder / name) as writer:
            for tag in ("losses", "norms"):
                for step, value in enumerate(run[tag]):
                    writer.add_scalar(tag, value, step)


def _runs(training: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for experiment, result in training.items():
        for run in result["runs"]:
            yield f"{experiment}-{run['name'].replace(' ', '-')}", run
