"""Adaptive clipping beside a fixed limit: a small GPT and three batches of garbage, which spike its loss.

Every contender trains the same model on the same data, in turns, and clips on step. The garbage is random bytes whose
loss counts SCALE times: gradients of another size and direction, which the moments of AdamW remember for long. One more
run with the fixed limit sees text instead of the garbage: what the others lose more than that is the garbage's doing.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from benchmarks.palette import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION
from benchmarks.table import markdown
from benchmarks.train import pair
from benchmarks.train.models import VOCABULARY, batches
from fusedclip.adaptive import AdaGC, AdaptiveRule, AutoClip, SkipSpikes, ZClip
from fusedclip.optim import clip_on_step

BATCH, CONTEXT, WIDTH, LAYERS, RATE = 8, 64, 96, 3, 2e-3
MAX_NORM = 1.0
SPIKE_AT, SPIKE_STEPS, SCALE = 0.6, 3, 30.0  # of all steps; batches; times the loss
AFTER = 20  # steps over which its cost is taken
MEAN_OF = 15  # steps
SPARED = "no garbage"
Batches = list[tuple[Tensor, Tensor]]
CONTENDERS: dict[str, Callable[[], float | AdaptiveRule]] = {
    SPARED: lambda: MAX_NORM,
    "not clipped": lambda: math.inf,
    "fixed": lambda: MAX_NORM,
    "AutoClip": AutoClip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "SkipSpikes": lambda: SkipSpikes(max_norm=MAX_NORM),
}


class Run(pair.Run):
    """One contender: its model, and what every step lost and measured."""

    def __init__(self, name: str, max_norm: float | AdaptiveRule, seed: int, spikes: range) -> None:
        optimizer = partial(torch.optim.AdamW, lr=RATE, fused=True)
        super().__init__(name, *pair.gpt(seed, optimizer, context=CONTEXT, width=WIDTH, layers=LAYERS), None, max_norm)
        self.told_by = self.handle = clip_on_step(self.optimizer, max_norm)
        self.spikes, self.clipped = range(0) if name == SPARED else spikes, list[bool]()

    def step(self, inputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        super().step(inputs, targets, SCALE if len(self.losses) in self.spikes else scale)
        assert self.handle.clip_coef is not None
        self.clipped.append(bool((self.handle.clip_coef < 1).any()))

    def result(self) -> dict[str, Any]:
        skipped = self.max_norm.skipped if isinstance(self.max_norm, SkipSpikes) else None
        return super().result() | {"clipped": statistics.fmean(self.clipped), "skipped": int(skipped or 0)}


def adaptive(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """All contenders through the same spike. `progress` is called after each step."""
    spikes = range(int(SPIKE_AT * steps), int(SPIKE_AT * steps) + SPIKE_STEPS)
    runs = [Run(name, make(), seed, spikes) for name, make in CONTENDERS.items()]
    text = batches(steps, BATCH, CONTEXT, seed)
    for step, (with_garbage, without) in enumerate(zip(_with_garbage(text, spikes, seed), text, strict=True)):
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(*(without if run.name == SPARED else with_garbage))
        progress()
    results = [run.result() for run in runs]
    spared = next(one["losses"] for one in results if one["name"] == SPARED)
    for one in results:
        excess = [loss - other for loss, other in zip(one["losses"], spared, strict=True)]
        one["before"] = statistics.fmean(excess[spikes.start - AFTER : spikes.start])
        one["cost"] = statistics.fmean(excess[spikes.stop : spikes.stop + AFTER]) - one["before"]
        one["last"] = statistics.fmean(one["losses"][-MEAN_OF:])
    return {"spikes": list(spikes), "max_norm": MAX_NORM, "runs": results}


def _with_garbage(text: Batches, spikes: range, seed: int) -> Batches:
    data, made = list(text), torch.Generator().manual_seed(seed + 1)
    for step in spikes:
        random = torch.randint(VOCABULARY, (2, BATCH, CONTEXT), generator=made)
        data[step] = random[0], random[1]
    return data


def summary(result: dict[str, Any]) -> str:
    """A line per contender."""
    header = ["clipped by", "clipped", "skipped", "loss before", "cost of the garbage", "last loss", "step"]
    lines = [
        [
            one["name"], f"{one['clipped']:.0%}", str(one["skipped"]), f"{one['before']:+.3f}", f"{one['cost']:+.3f}",
            f"{one['last']:.3f}", f"{one['step_ms']:.1f} ms",
        ]
        for one in result["runs"]
    ]  # fmt: skip
    return (
        f"{markdown(header, lines)}\n{len(result['runs'][0]['losses'])} steps; random bytes at steps "
        f"{result['spikes'][0]} to {result['spikes'][-1]}, whose loss counts {SCALE:g} times. Losses before are those "
        f"above the run without garbage in the {AFTER} steps before it; its cost is how much larger that is in the "
        f"{AFTER} steps after"
    )


def picture(result: dict[str, Any]) -> str:
    """What garbage costs each contender: its loss above that of a run that was spared it, and its norm."""
    from matplotlib import pyplot

    spared, *runs = result["runs"]
    colours = (GREY, BLACK, ORANGE, BLUE, GREEN, VERMILION)
    _, panels = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 2))
    first, last = result["spikes"][0], result["spikes"][-1]
    start, end, highest = max(0, first - 40), min(len(spared["losses"]), last + 80), 0.1
    for run, colour in zip(runs, colours, strict=True):
        excess = np.array(run["losses"], float) - spared["losses"]
        excess[first : last + 1] = math.nan
        excess = _smoothed(excess)
        if run is not runs[0]:  # without clipping it leaves the picture
            highest = max(highest, *excess[last + 1 : end])
        how = {"color": colour, "linewidth": 1.6, "linestyle": "--" if run is runs[0] else "-"}
        panels[0].plot(excess, label=f"{run['name']}: {run['cost']:+.2f}", **how)
        panels[1].semilogy(run["norms"], **how)
    for axes in panels:
        axes.axvspan(first - 0.5, last + 0.5, color=GREY, alpha=0.25, linewidth=0)
    panels[0].set(ylim=(-0.15, 1.15 * highest), xlim=(start, end))
    panels[0].set_ylabel("loss above that of a run without\nthe garbage (mean of 5 steps)")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="mean of the 20 steps after")
    panels[1].set(xlabel="step", ylabel="gradient norm\nbefore clipping")
    return f"A small GPT meets {last - first + 1} batches of random bytes (grey)"


def _smoothed(values: Any, width: int = 5) -> Any:
    """Means of those that are numbers."""
    padded = np.concatenate([np.full(width - 1, math.nan), values])
    return np.ma.masked_invalid(sliding_window_view(padded, width)).mean(axis=1).filled(math.nan)
