"""Steps of a run: gradients whose norms are as a training's, with all that may go wrong in one."""

import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..conftest import Engine

SHAPES = [(7, 5), (11,), (), (3, 2, 4)]
STEPS = 300
SPIKES = {40, 41, 120, 180, 181, 182, 183, 184, 250}
ODD: dict[int, float] = {3: 0.0, 10: math.inf, 11: math.nan, 150: 0.0, 160: math.inf, 201: math.nan}
WITHOUT = {2: 1, 77: 0, 130: 3}  # a step, and which gradient it lacks

Build = Callable[[], object]


def gradients(engine: Engine, steps: int = STEPS) -> Iterator[list[Tensor | None]]:
    """The same each time: noise around a norm that falls, spikes, zeros, inf, NaN, and gradients that are not there."""
    noise, made = random.Random(0), torch.Generator().manual_seed(0)
    for step in range(steps):
        size = math.exp(noise.gauss(0, 0.15)) * (0.4 + math.exp(-step / 60)) * (40 if step in SPIKES else 1)
        grads = [torch.randn(shape, generator=made) * size * noise.uniform(0.7, 1.3) / 4 for shape in SHAPES]
        if step in ODD:
            if ODD[step] == 0:
                grads = [torch.zeros(shape) for shape in SHAPES]
            else:
                grads[1][4] = ODD[step]
        yield [None if WITHOUT.get(step) == i else grad.to(engine.device) for i, grad in enumerate(grads)]


def norms(grads: list[Tensor | None]) -> list[float | None]:
    """In plain floats, from the elements."""
    return [
        None if grad is None else math.sqrt(math.fsum(x * x for x in grad.double().flatten().tolist()))
        for grad in grads
    ]
