"""Adaptive clipping beside a fixed limit: a small GPT and three batches of garbage, which spike its loss.

Every contender trains the same model on the same data, in turns, and clips on step. The garbage is random bytes whose
loss counts SCALE times: gradients of another size and direction, which the moments of AdamW remember for long.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.table import markdown
from benchmarks.train.models import GPT
from benchmarks.train.text import VOCABULARY, batches
from fusedclip.adaptive import AdaGC, AdaptiveRule, AutoClip, SkipSpikes, ZClip
from fusedclip.optim import clip_on_step

BATCH, CONTEXT, WIDTH, LAYERS, RATE, WARM_UP = 8, 64, 96, 3, 2e-3, 20
MAX_NORM = 1.0
SPIKE_AT, SPIKE_STEPS, SCALE = 0.6, 3, 30.0  # of all steps; batches; times the loss
MEAN_OF = 15  # steps
CONTENDERS: dict[str, Callable[[], float | AdaptiveRule]] = {
    "not clipped": lambda: math.inf,
    "fixed": lambda: MAX_NORM,
    "AutoClip": AutoClip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "SkipSpikes": lambda: SkipSpikes(max_norm=MAX_NORM),
}


class Run:
    """One contender: its model, and what every step lost and measured."""

    def __init__(self, name: str, max_norm: float | AdaptiveRule, seed: int, spikes: range) -> None:
        torch.manual_seed(seed)
        self.name, self.max_norm, self.spikes = name, max_norm, spikes
        self.model = GPT(CONTEXT, WIDTH, LAYERS)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.warm_up = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / WARM_UP, total_iters=WARM_UP - 1)
        self.handle = clip_on_step(self.optimizer, max_norm)
        self.losses, self.norms, self.clipped = list[float](), list[float](), list[bool]()
        self.step_ms = list[float]()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        scale = SCALE if len(self.losses) in self.spikes else 1.0
        (scale * loss).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.warm_up.step()
        self.optimizer.zero_grad()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        assert self.handle.total_norm is not None
        assert self.handle.clip_coef is not None
        self.losses.append(loss.item())
        self.norms.append(self.handle.total_norm.item())
        self.clipped.append(bool((self.handle.clip_coef < 1).any()))

    def result(self) -> dict[str, Any]:
        skipped = self.max_norm.skipped if isinstance(self.max_norm, SkipSpikes) else None
        return {
            "name": self.name,
            "losses": self.losses,
            "norms": self.norms,
            "clipped": statistics.fmean(self.clipped),
            "skipped": 0 if skipped is None else int(skipped),
            "step_ms": statistics.median(self.step_ms),
            **_recovery(self.losses, self.spikes),
        }


def adaptive(seed: int, steps: int, progress: Callable[[], object]) -> dict[str, Any]:
    """All contenders through the same spike. `progress` is called after each step."""
    spikes = range(int(SPIKE_AT * steps), int(SPIKE_AT * steps) + SPIKE_STEPS)
    runs = [Run(name, make(), seed, spikes) for name, make in CONTENDERS.items()]
    for inputs, targets in _data(seed, steps, spikes):
        for run in runs:
            run.step(inputs, targets)
        progress()
    return {"spikes": list(spikes), "max_norm": MAX_NORM, "runs": [run.result() for run in runs]}


def _data(seed: int, steps: int, spikes: range) -> list[tuple[Tensor, Tensor]]:
    data, garbage = batches(steps, BATCH, CONTEXT, seed), torch.Generator().manual_seed(seed + 1)
    for step in spikes:
        random = torch.randint(VOCABULARY, (2, BATCH, CONTEXT), generator=garbage)
        data[step] = random[0], random[1]
    return data


def _recovery(losses: Sequence[float], spikes: range) -> dict[str, float | int | None]:
    """How far the loss on real text rose after the garbage, and after how many steps it was back where it had been."""
    before = statistics.fmean(losses[max(0, spikes.start - MEAN_OF) : spikes.start])
    after = losses[spikes.stop :]
    means = [statistics.fmean(after[i : i + 5]) for i in range(max(len(after) - 4, 0))]
    back = next((i for i, loss in enumerate(means) if loss <= before), None)
    return {
        "before": before,
        "highest": max(after, default=math.nan),
        "back_after": back,
        "last": statistics.fmean(losses[-MEAN_OF:]),
    }


def summary(result: dict[str, Any]) -> str:
    """A line per contender."""
    header = ["clipped by", "clipped", "skipped", "loss before", "highest after", "back after", "last loss", "step"]
    lines = [
        [
            one["name"], f"{one['clipped']:.0%}", str(one["skipped"]), f"{one['before']:.3f}", f"{one['highest']:.3f}",
            "never" if one["back_after"] is None else f"{one['back_after']} steps", f"{one['last']:.3f}",
            f"{one['step_ms']:.1f} ms",
        ]
        for one in result["runs"]
    ]  # fmt: skip
    return (
        f"{markdown(header, lines)}\n{len(result['runs'][0]['losses'])} steps; random bytes at steps "
        f"{result['spikes'][0]} to {result['spikes'][-1]}, whose loss counts {SCALE:g} times; 'back' is a mean of five "
        f"losses no higher than the mean of the {MEAN_OF} before"
    )
