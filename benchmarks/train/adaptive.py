"""Adaptive clipping beside a fixed limit: a small GPT and three batches of garbage, which spike its loss.

Every contender trains the same model on the same data, in turns, and clips on step. The garbage is random bytes whose
loss counts SCALE times: gradients of another size and direction, which the moments of AdamW remember for long. One more
run with the fixed limit sees text instead of the garbage: what the others lose more than that is the garbage's doing.
"""

import math
import statistics
import time
from collections.abc import Callable
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


class Run:
    """One contender: its model, and what every step lost and measured."""

    def __init__(self, name: str, max_norm: float | AdaptiveRule, seed: int, spikes: range) -> None:
        torch.manual_seed(seed)
        self.name, self.max_norm, self.spikes = name, max_norm, range(0) if name == SPARED else spikes
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
        }


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
