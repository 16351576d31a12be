"""Pairs of optimizers with equal parameters: one clips on step, the other is clipped by torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

FUSED_KINDS = [
    (Adam, {}),
    (AdamW, {}),
    (SGD, {}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (Adagrad, {}),
]


def pair(kind: Callable[..., Optimizer], **options: Any) -> tuple[Optimizer, Optimizer]:
    """Two optimizers with equal parameters, in two groups of which one has lr 0.2."""

    def make() -> Optimizer:
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
        return kind([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.2}], lr=0.1, **options)

    return make(), make()


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(*optimizers: Optimizer, seed: int = 0, bad: float | None = None) -> None:
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for p in held(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        if bad is not None:
            held(optimizer)[1].grad[2, 2] = bad


def assert_same(ours: Optimizer, theirs: Optimizer) -> None:
    for a, b in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def closure_for(optimizer: Optimizer, clip: bool) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**4).sum() for p in held(optimizer))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(held(optimizer), 0.3)
        return loss

    return closure
