"""Training runs of the same model on the same data that take turns step by step and differ in how they clip."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.train.models import GPT

Clip = Callable[..., Tensor]  # of parameters and max_norm
# Without warm-up AdamW amplifies a difference in the last bit to 0.09 within 160 steps; with it that stays near 1e-6.
WARM_UP = 20
LAST = 20


class Run:
    """One of them: its model, and what every step lost, measured and took.

    `clip` is None where the optimizer's step clips; `told_by`, the optimizer if nobody else, has the norm then.
    """

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, clip: Clip | None, max_norm: Any = None):
        self.name, self.model, self.optimizer, self.clip, self.max_norm = name, model, optimizer, clip, max_norm
        self.told_by: Any = optimizer
        self.parameters = list(model.parameters())
        self.losses, self.norms, self.step_ms, self.clip_ms = (list[float]() for _ in range(4))

    def step(self, inputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        """A training step on `scale` times the loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1).float(), targets.flatten())
        (scale * loss).backward()  # type: ignore[no-untyped-call]
        before_clip = time.perf_counter()
        norm = self.clip(self.parameters, self.max_norm) if self.clip else None
        self.clip_ms.append((time.perf_counter() - before_clip) * 1e3)
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.losses.append(loss.item())
        self.norms.append(float(self.told_by.total_norm if norm is None else norm))

    def result(self) -> dict[str, Any]:
        """The curves, and the times; those of clipping where it is a call of its own."""
        curves = {"name": self.name, "losses": self.losses, "norms": self.norms}
        times = {"step_ms": statistics.median(self.step_ms)}
        if self.clip:
            share = sum(self.clip_ms) / sum(self.step_ms)
            times |= {"clip_ms": statistics.median(self.clip_ms), "clip_share": share}
        return curves | times


def gpt(
    seed: int, optimizer: Callable[..., Optimizer], dtype: torch.dtype = torch.float32, **size: int
) -> tuple[nn.Module, Optimizer]:
    """A GPT with the same weights for the same seed, and its optimizer, whose rate warms up."""
    torch.manual_seed(seed)
    model = GPT(**size).to(dtype)
    made = optimizer(model.parameters())
    warm_up = torch.optim.lr_scheduler.LinearLR(made, 1 / WARM_UP, total_iters=WARM_UP - 1)
    made.register_step_post_hook(lambda *_: warm_up.step())
    return model, made


def train(runs: Sequence[Run], data: Iterable[tuple[Tensor, Tensor]], progress: Callable[[], object]) -> None:
    """All runs see each batch, in turns; a run whose loss is not finite any more is over."""
    for index, (inputs, targets) in enumerate(data):
        for run in runs if index % 2 == 0 else reversed(runs):
            if not run.losses or math.isfinite(run.losses[-1]):
                run.step(inputs, targets)
        progress()


def final(losses: Sequence[float]) -> float:
    """The mean of the last steps; not a number if any of them isn't."""
    return statistics.fmean(losses[-LAST:])


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two loss curves, NaN included: a curve that ends early or is not a number differs infinitely."""
    apart = float(np.abs(np.subtract(first, second)).max()) if len(first) == len(second) else math.inf
    return math.inf if math.isnan(apart) else apart
