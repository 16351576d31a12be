"""The main job's GPT under torch's AdamW and clip, under our AdamW, and under ours with fewer bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.palette import BLUE, GREEN, GREY, VERMILION
from benchmarks.table import markdown
from benchmarks.train.models import batches
from benchmarks.train.pair import LAST, Run, final, gpt, largest_difference, train
from fusedclip.optim import AdamW

BATCH, MAX_NORM, CONTEXT = 8, 0.5, 128
# bf16 moments want a beta2 of 0.99 or less; the others get the same.
OPTIONS: Any = {"lr": 1e-3, "betas": (0.9, 0.99)}
MEAN_OF = 15  # steps
OURS = "fusedclip.optim.AdamW"
BF16, MASTER = "bf16 moments", "bf16 model, split master"


def optimizers(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """All of them on the same data; the bf16 model starts with the same weights, rounded."""
    torchs, ours = partial(torch.optim.AdamW, fused=True, **OPTIONS), partial(AdamW, max_norm=MAX_NORM, **OPTIONS)
    in_bf16, split = partial(ours, moments=torch.bfloat16), partial(ours, master="split")
    runs = [
        Run("torch's AdamW and clip", *gpt(seed, torchs, context=CONTEXT), clip_grad_norm_, MAX_NORM),
        Run(OURS, *gpt(seed, ours, context=CONTEXT), None),
        Run(f"{OURS}, {BF16}", *gpt(seed, in_bf16, context=CONTEXT), None),
        Run(f"{OURS}, {MASTER}", *gpt(seed, split, torch.bfloat16, context=CONTEXT), None),
    ]
    train(runs, batches(steps, BATCH, CONTEXT, seed), progress)
    first = runs[0].losses
    return {
        "max_norm": MAX_NORM,
        "betas": OPTIONS["betas"],
        "clipped_steps": sum(norm > MAX_NORM for norm in runs[0].norms),
        "runs": [
            run.result()
            | {"last": final(run.losses), "apart": largest_difference(first, run.losses), "bytes_kept": bytes_kept(run)}
            for run in runs
        ],
    }


def bytes_kept(run: Run) -> float:
    """Per parameter, of the model and of the optimizer's state."""
    states = [tensor for state in run.optimizer.state.values() for tensor in state.values()]
    nbytes: int = sum(one.nbytes for one in [*run.parameters, *states])
    return nbytes / sum(one.numel() for one in run.parameters)


def summary(result: dict[str, Any]) -> str:
    """A line per run."""
    runs = result["runs"]
    header = ["optimizer", "bytes kept", f"loss, last {LAST} steps", "above the first", "apart at most"]
    lines = [
        [
            *(one["name"], f"{one['bytes_kept']:.1f}", f"{one['last']:.4f}"),
            *(f"{one['last'] - runs[0]['last']:+.4f}", f"{one['apart']:.1g}"),
        ]
        for one in runs
    ]
    steps = len(runs[0]["losses"])
    return (
        f"{markdown(header, lines)}\n\n{steps} steps of the main job's GPT, {result['clipped_steps']} of them clipped "
        f"to {result['max_norm']:g}, betas {tuple(result['betas'])}. Bytes kept are those of a parameter and its "
        "states; losses are in nats per byte."
    )


def picture(result: dict[str, Any]) -> str:
    """The losses upon each other, and how far each is above torch's."""
    from matplotlib import pyplot

    _, panels = pyplot.subplots(2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2))
    first, *others = result["runs"]
    window = np.full(MEAN_OF, 1 / MEAN_OF)
    panels[0].plot(first["losses"], color=GREY, linewidth=5.0, alpha=0.5, label=f"{first['name']}: {first['last']:.3f}")
    for run, colour in zip(others, (BLUE, GREEN, VERMILION), strict=True):
        panels[0].plot(run["losses"], color=colour, linewidth=1.0, label=f"{run['name']}: {run['last']:.3f}")
        above = np.convolve(np.subtract(run["losses"], first["losses"]), window, mode="valid")
        panels[1].plot(range(MEAN_OF - 1, len(first["losses"])), above, color=colour, linewidth=1.5)
    panels[0].set_ylabel("loss (nats per byte)")
    panels[0].legend(title=f"mean of the last {LAST} steps")
    panels[1].set(xlabel="step", ylabel=f"loss above torch's\n(mean of {MEAN_OF} steps)")
    return "The main job's GPT by optimizer"
