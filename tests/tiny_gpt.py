"""A GPT small enough to train for 200 steps in half a second, and its training loop with a loss scaler."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY, LENGTH, BATCH = 8, 11, 6, 4


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        # No bias: that of the keys has a gradient of 0 but for rounding, which some optimizers blow up to full steps.
        self.attend = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight
        query, key, value = self.attend(self.norm(x)).chunk(3, -1)
        x = x + self.project(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        x = x + self.narrow(F.gelu(self.widen(self.norm(x))))
        return x @ self.token.weight.T


def model(dtype: torch.dtype = torch.float32) -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT().to(dtype)


def batches(steps: int) -> list[Tensor]:
    """Sequences that count upwards, one token in four a random one."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(VOCABULARY, (steps, BATCH, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH + 1)) % VOCABULARY
    noise = torch.randint(VOCABULARY, tokens.shape, generator=generator)
    return list(torch.where(torch.rand(tokens.shape, generator=generator) < 0.25, noise, tokens))


def loss_of(gpt: TinyGPT, tokens: Tensor) -> Tensor:
    return F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(
    gpt: TinyGPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: Callable[[], object],
    steps: int,
    planted: frozenset[int],
) -> list[float]:
    """Train with `clip()` before each `scaler.step`, an inf planted into the gradients of some steps.

    Returns the scale at each step: its fall tells which steps were skipped.
    """
    scales = []
    for step, tokens in enumerate(batches(steps)):
        optimizer.zero_grad()
        scaler.scale(loss_of(gpt, tokens)).backward()
        if step in planted:
            gpt.widen.weight.grad[3, 5] = torch.inf
        clip()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales
