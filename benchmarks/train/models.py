"""A small byte-level GPT and a byte-level LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.train.text import VOCABULARY


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before_attention(x))
        return x + self.feed_forward(self.before_feed_forward(x))  # type: ignore[no-any-return]

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Predicts the next byte from up to `context` before it."""

    def __init__(self, width: int = 128, layers: int = 6, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.bytes(x) + self.positions(where))))  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """Predicts the next byte from its state; backpropagation runs through the whole sequence."""

    def __init__(self, width: int = 128, embedding: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, embedding)
        self.lstm, self.head = nn.LSTM(embedding, width, batch_first=True), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.bytes(x))
        return self.head(states)  # type: ignore[no-any-return]
