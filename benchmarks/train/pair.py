"""Training runs of the same model on the same data that take turns step by step and differ in how they clip."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Clip = Callable[..., Tensor]  # of parameters and max_norm


class Run:
    """One of them: its model, and what every step lost, measured and took."""

    def __init__(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, clip: Clip, max_norm: float):
        self.name, self.model, self.optimizer, self.clip, self.max_norm = name, model, optimizer, clip, max_norm
        self.parameters = list(model.parameters())
        self.losses, self.norms, self.step_ms, self.clip_ms = (list[float]() for _ in range(4))

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        before_clip = time.perf_counter()
        norm = self.clip(self.parameters, self.max_norm)
        self.clip_ms.append((time.perf_counter() - before_clip) * 1e3)
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.losses.append(loss.item())
        self.norms.append(norm.item())

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "losses": self.losses,
            "norms": self.norms,
            "step_ms": statistics.median(self.step_ms),
            "clip_ms": statistics.median(self.clip_ms),
            "clip_share": sum(self.clip_ms) / sum(self.step_ms),
        }


def train(runs: Sequence[Run], data: Iterable[tuple[Tensor, Tensor]], progress: Callable[[], object]) -> None:
    """All runs see each batch, in turns; a run whose loss is not finite any more is over."""
    for index, (inputs, targets) in enumerate(data):
        for run in runs if index % 2 == 0 else reversed(runs):
            if not run.losses or math.isfinite(run.losses[-1]):
                run.step(inputs, targets)
        progress()


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two loss curves, NaN included: a curve that ends early or is not a number differs infinitely."""
    if len(first) != len(second):
        return math.inf
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences, default=0.0)
