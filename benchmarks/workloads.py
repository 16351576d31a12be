"""Named lists of gradient shapes: real models, written out from their hyper-parameters, and lists of equal tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 1 << 30
SMALL_LISTS = (20_000, 40_000, 80_000, 120_000)  # elements per tensor; 8 to 48 MB for a hundred of them in fp32
HOST_COUNTS = (10, 30, 100, 300, 1_000, 3_000, 10_000)

Shape = tuple[int, ...]
Shapes = list[Shape]


@dataclass(frozen=True)
class Stack:
    """A model as most are built: something before, the same layer many times, something after."""

    before: tuple[Shape, ...]
    layer: tuple[Shape, ...]
    layers: int
    after: tuple[Shape, ...] = ()

    def shapes(self, layers: int | None = None) -> Shapes:
        count = self.layers if layers is None else layers
        return [*self.before, *(self.layer * count), *self.after]

    def sharded(self, ranks: int) -> Stack:
        """One rank's part under FSDP: dimension 0 of every tensor is cut into `ranks` parts, rounded up."""

        def cut(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
            return tuple((-(-shape[0] // ranks), *shape[1:]) for shape in shapes)

        return Stack(cut(self.before), cut(self.layer), self.layers, cut(self.after))


@dataclass(frozen=True)
class Workload:
    """A list of shapes under a name; `cut` says which part of the model it is, None for all of it."""

    name: str
    title: str
    shapes: Shapes
    cut: str | None

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))


def affine(out_features: int, in_features: int) -> tuple[Shape, ...]:
    """Weight and bias of a linear layer."""
    return (out_features, in_features), (out_features,)


def scale_and_shift(width: int) -> tuple[Shape, ...]:
    """Weight and bias of a LayerNorm or BatchNorm."""
    return (width,), (width,)


def gpt2(width: int, layers: int, vocabulary: int = 50257, context: int = 1024) -> Stack:
    """GPT-2 as published; the output layer shares the embedding. Conv1D stores its weights as (in, out)."""
    layer = (
        *scale_and_shift(width),
        *((width, 3 * width), (3 * width,)),
        *affine(width, width),
        *scale_and_shift(width),
        *((width, 4 * width), (4 * width,)),
        *((4 * width, width), (width,)),
    )
    return Stack(((vocabulary, width), (context, width)), layer, layers, scale_and_shift(width))


def llama3(width: int, layers: int, key_value_width: int, hidden: int, vocabulary: int = 128256) -> Stack:
    """Llama 3: grouped-query attention, SwiGLU, RMSNorm, no biases, input and output embedding apart."""
    attention = ((width, width), (key_value_width, width), (key_value_width, width), (width, width))
    feed_forward = ((hidden, width), (hidden, width), (width, hidden))
    layer = (*attention, *feed_forward, (width,), (width,))
    return Stack(((vocabulary, width),), layer, layers, ((width,), (vocabulary, width)))


def llama3_lora(width: int, layers: int, key_value_width: int, hidden: int, rank: int) -> Stack:
    """LoRA on all seven linear layers of a Llama block: A is (rank, in), B is (out, rank)."""
    linears = (
        *((width, width), (key_value_width, width), (key_value_width, width), (width, width)),
        *((hidden, width), (hidden, width), (width, hidden)),
    )
    layer = tuple(shape for out, in_ in linears for shape in ((rank, in_), (out, rank)))
    return Stack((), layer, layers)


def mixture_of_experts(
    width: int, layers: int, experts: int, hidden: int, query_width: int, key_value_width: int, head: int = 128
) -> Stack:
    """The layer stack of a Qwen3-like mixture of experts, each expert three matrices of its own, no embeddings."""
    attention = ((query_width, width), (key_value_width, width), (key_value_width, width), (width, query_width))
    norms = ((head,), (head,), (width,), (width,))
    expert = ((hidden, width), (hidden, width), (width, hidden))
    return Stack((), (*attention, *norms, (experts, width), *(expert * experts)), layers)


def vit(width: int, layers: int, patch: int = 16, image: int = 224, classes: int = 1000) -> Stack:
    """Vision Transformer: class token, patch convolution, positions, encoder layers, head."""
    tokens = (image // patch) ** 2 + 1
    layer = (
        *scale_and_shift(width),
        *affine(3 * width, width),
        *affine(width, width),
        *scale_and_shift(width),
        *affine(4 * width, width),
        *affine(width, 4 * width),
    )
    before = ((1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width))
    return Stack(before, layer, layers, (*scale_and_shift(width), *affine(classes, width)))


def resnet(blocks: tuple[int, ...], classes: int = 1000, expansion: int = 4) -> Stack:
    """ResNet of bottleneck blocks (3, 4, 6, 3 is ResNet-50); one piece, since its layers differ, and never cut."""
    shapes: Shapes = [(64, 3, 7, 7), *scale_and_shift(64)]
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            out = width * expansion
            for conv in ((width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)):
                shapes += [conv, *scale_and_shift(conv[0])]
            if block == 0:
                shapes += [(out, channels, 1, 1), *scale_and_shift(out)]
            channels = out
    return Stack((), (*shapes, *affine(classes, channels)), 1)


MODELS: dict[str, tuple[str, Stack]] = {
    "gpt2": ("GPT-2 124M", gpt2(768, 12)),
    "gpt2-xl": ("GPT-2 XL", gpt2(1600, 48)),
    "llama3-8b-shard": ("Llama-3-8B, one of 8 shards", llama3(4096, 32, 1024, 14336).sharded(8)),
    "moe-128-shard": (
        "128-expert MoE layers, one of 8 shards",
        mixture_of_experts(2048, 48, 128, 768, query_width=4096, key_value_width=512).sharded(8),
    ),
    "resnet50": ("ResNet-50", resnet((3, 4, 6, 3))),
    "vit-b16": ("ViT-B/16", vit(768, 12)),
    "lora-8b": ("LoRA r=16 on an 8B Llama", llama3_lora(4096, 32, 1024, 14336, rank=16)),
}

# A list of equal tensors is one piece and never cut.
EQUAL = [
    (2_000, 1_024),
    (1_000, 256),
    (5_000, 64),
    (300, 4_096),
    *((100, size) for size in SMALL_LISTS),
    (500, 450_000),
]
SINGLE = {"2^24": 1 << 24, "2^26": 1 << 26, "1.536e9": 1_536_000_000}
HOST = [(count, elements) for elements in (256, 8) for count in HOST_COUNTS]


def equal(count: int, elements: int) -> tuple[str, Stack]:
    return f"{count:,} tensors of {elements:,}", Stack((), ((elements,),) * count, 1)


CATALOGUE: dict[str, tuple[str, Stack]] = {
    **MODELS,
    **{f"{count}x{elements}": equal(count, elements) for count, elements in EQUAL},
    **{f"one-{name}": (f"one tensor of {name}", Stack((), ((elements,),), 1)) for name, elements in SINGLE.items()},
    **{f"host-{count}x{elements}": equal(count, elements) for count, elements in HOST},
}


def load(name: str, element_size: int, budget_bytes: int = GIB) -> Workload:
    """The workload of that name, with as many layers as fit into `budget_bytes` (one at least)."""
    if name not in CATALOGUE:
        raise KeyError(f"no workload {name!r}; there are {', '.join(CATALOGUE)}")
    title, stack = CATALOGUE[name]
    layers = _layers_that_fit(stack, budget_bytes // element_size)
    cut = None if layers == stack.layers else f"{layers} of {stack.layers} layers"
    return Workload(name, f"{title} ({cut})" if cut else title, stack.shapes(layers), cut)


def _layers_that_fit(stack: Stack, elements: int) -> int:
    outside = sum(map(math.prod, stack.shapes(0)))
    per_layer = sum(map(math.prod, stack.layer))
    return max(1, min(stack.layers, (elements - outside) // per_layer))
