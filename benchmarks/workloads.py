"""Named lists of gradient shapes: real models, written out from their hyper-parameters, and lists of equal tensors."""

import math
from dataclasses import dataclass, replace

GIB = 1 << 30
SMALL_LISTS = (20_000, 40_000, 80_000, 120_000)  # elements per tensor; 8 to 48 MB for a hundred of them in fp32
HOST_COUNTS = (10, 30, 100, 300, 1_000, 3_000, 10_000)

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Workload:
    """A model as most are built: something before, the same layer many times, something after.

    `cut` says which part of the model it is, None for all of it.
    """

    title: str
    layer: Shapes
    layers: int = 1
    before: Shapes = ()
    after: Shapes = ()
    name: str = ""
    cut: str | None = None

    @property
    def shapes(self) -> Shapes:
        return (*self.before, *(self.layer * self.layers), *self.after)

    @property
    def elements(self) -> int:
        return total(self.shapes)

    def sharded(self, ranks: int) -> "Workload":
        """One rank's part under FSDP: dimension 0 of every tensor is cut into `ranks` parts, rounded up."""
        parts = (self.layer, self.before, self.after)
        layer, before, after = (tuple((-(-one[0] // ranks), *one[1:]) for one in part) for part in parts)
        return Workload(f"{self.title}, one of {ranks} shards", layer, self.layers, before, after)


def total(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def linear(out_features: int, in_features: int) -> Shapes:
    """Weight and bias."""
    return (out_features, in_features), (out_features,)


def norm(width: int) -> Shapes:
    """Weight and bias of a LayerNorm or BatchNorm."""
    return (width,), (width,)


def encoder(width: int) -> Shapes:
    """A layer of GPT-2 or ViT: attention and a feed-forward network. (GPT-2 stores its weights as (in, out).)"""
    attention = (*norm(width), *linear(3 * width, width), *linear(width, width))
    return (*attention, *norm(width), *linear(4 * width, width), *linear(width, 4 * width))


def gpt2(title: str, width: int, layers: int) -> Workload:
    """As published; the output layer shares the embedding."""
    return Workload(title, encoder(width), layers, ((50257, width), (1024, width)), norm(width))


# The linear layers of a Llama-3-8B block: grouped-query attention, SwiGLU, no biases.
LLAMA3 = (
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    *((14336, 4096), (14336, 4096), (4096, 14336)),
)


def mixture_of_experts(width: int = 2048, experts: int = 128, hidden: int = 768) -> Shapes:
    """A layer of a Qwen3-like mixture of experts, each expert three matrices of its own."""
    attention = ((4096, width), (512, width), (512, width), (width, 4096), (128,), (128,), (width,), (width,))
    return (*attention, (experts, width), *(((hidden, width), (hidden, width), (width, hidden)) * experts))


def resnet50() -> Shapes:
    """Bottleneck blocks in four stages; one piece, since its layers differ, and never cut."""
    shapes, channels = [(64, 3, 7, 7), *norm(64)], 64
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(count):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, channels, 1, 1)] if block == 0 else []
            shapes += [shape for one in convolutions for shape in (one, *norm(one[0]))]
            channels = 4 * width
    return (*shapes, *linear(1000, channels))


def equal(count: int, size: int) -> Workload:
    """A list of equal tensors is one piece and never cut."""
    return Workload(f"{count:,} tensors of {size:,}", ((size,),) * count)


MODELS = {
    "gpt2": gpt2("GPT-2 124M", 768, 12),
    "gpt2-xl": gpt2("GPT-2 XL", 1600, 48),
    "llama3-8b-shard": Workload(
        "Llama-3-8B", (*LLAMA3, (4096,), (4096,)), 32, ((128256, 4096),), ((4096,), (128256, 4096))
    ).sharded(8),
    "moe-128-shard": Workload("128-expert MoE layers", mixture_of_experts(), 48).sharded(8),
    "resnet50": Workload("ResNet-50", resnet50()),
    "vit-b16": Workload(  # class token, patch convolution, positions; head
        "ViT-B/16", encoder(768), 12, ((1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)),
        (*norm(768), *linear(1000, 768)),
    ),
    # A is (rank, in), B is (out, rank).
    "lora-8b": Workload("LoRA r=16 on an 8B Llama", tuple(one for o, i in LLAMA3 for one in ((16, i), (o, 16))), 32),
}  # fmt: skip
EQUAL = ((2_000, 1_024), (1_000, 256), (5_000, 64), (300, 4_096), *((100, n) for n in SMALL_LISTS), (500, 450_000))
SINGLE = {"2^24": 1 << 24, "2^26": 1 << 26, "1.536e9": 1_536_000_000}
CATALOGUE: dict[str, Workload] = {
    **MODELS,
    **{f"{count}x{size}": equal(count, size) for count, size in EQUAL},
    **{f"one-{name}": Workload(f"one tensor of {name}", ((size,),)) for name, size in SINGLE.items()},
    **{f"host-{count}x{size}": equal(count, size) for size in (256, 8) for count in HOST_COUNTS},
}


def load(name: str, element_size: int, budget_bytes: int = GIB) -> Workload:
    """The workload of that name, with as many layers as fit into `budget_bytes` (one at least)."""
    whole = replace(CATALOGUE[name], name=name)
    fitting = (budget_bytes // element_size - total(whole.before + whole.after)) // total(whole.layer)
    layers = max(1, min(whole.layers, fitting))
    if layers == whole.layers:
        return whole
    cut = f"{layers} of {whole.layers} layers"
    return replace(whole, title=f"{whole.title} ({cut})", layers=layers, cut=cut)
