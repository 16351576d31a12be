"""What is trained: a small byte-level GPT, a byte-level LSTM, and real text that every Python has for both of them."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

VOCABULARY = 256
MEGABYTES = 4


class GPT(nn.Module):
    """Predicts the next byte from up to `context` before it."""

    def __init__(self, context: int, width: int = 128, layers: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)
        past = nn.Transformer.generate_square_subsequent_mask(len(where), x.device)
        embedded = self.bytes(x) + self.positions(where)
        return self.head(self.blocks(embedded, past, is_causal=True))  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """Predicts the next byte from its state; backpropagation runs through the whole sequence."""

    def __init__(self, width: int = 128, embedding: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, embedding)
        self.lstm, self.head = nn.LSTM(embedding, width, batch_first=True), nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.bytes(x))[0])  # type: ignore[no-any-return]


def batches(count: int, batch: int, length: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random windows of the standard library's own sources (its top-level modules in order of their names, up to
    MEGABYTES), each with its successor byte by byte, int64, on the CPU.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))[: MEGABYTES << 20]
    if len(sources) < 1 << 16:
        raise RuntimeError(f"this Python's standard library has no sources to train on in {folder}")
    text, generator = torch.frombuffer(bytearray(sources), dtype=torch.uint8), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count, batch), generator=generator)
    windows = text[starts[..., None] + torch.arange(length + 1)].long()
    return [(window[:, :-1], window[:, 1:]) for window in windows]
