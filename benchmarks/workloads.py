"""Named lists of gradient shapes: real models and synthetic lists, cut to a memory budget where they have to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks import shapes as models
from benchmarks.shapes import Shapes, Stack

GIB = 1 << 30
SMALL_LISTS = (20_000, 40_000, 80_000, 120_000)  # elements per tensor; 8 to 48 MB for a hundred of them in fp32
HOST_COUNTS = (10, 30, 100, 300, 1_000, 3_000, 10_000)


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


def same(count: int, elements: int) -> Stack:
    """`count` tensors of `elements` elements; a synthetic list is one piece and never cut."""
    return Stack((), ((elements,),) * count, 1)


MODELS: dict[str, tuple[str, Stack]] = {
    "gpt2": ("GPT-2 124M", models.gpt2(768, 12)),
    "gpt2-xl": ("GPT-2 XL", models.gpt2(1600, 48)),
    "llama3-8b-shard": ("Llama-3-8B, one of 8 shards", models.llama3(4096, 32, 1024, 14336).sharded(8)),
    "moe-128-shard": (
        "128-expert MoE layers, one of 8 shards",
        models.mixture_of_experts(2048, 48, 128, 768, query_width=4096, key_value_width=512).sharded(8),
    ),
    "resnet50": ("ResNet-50", models.resnet((3, 4, 6, 3))),
    "vit-b16": ("ViT-B/16", models.vit(768, 12)),
    "lora-8b": ("LoRA r=16 on an 8B Llama", models.llama3_lora(4096, 32, 1024, 14336, rank=16)),
}

SYNTHETIC: dict[str, tuple[str, Stack]] = {
    "2000x1024": ("2,000 tensors of 1,024", same(2_000, 1_024)),
    "1000x256": ("1,000 tensors of 256", same(1_000, 256)),
    "5000x64": ("5,000 tensors of 64", same(5_000, 64)),
    "300x4096": ("300 tensors of 4,096", same(300, 4_096)),
    **{f"100x{size}": (f"100 tensors of {size:,}", same(100, size)) for size in SMALL_LISTS},
    "500x450000": ("500 tensors of 450,000", same(500, 450_000)),
    "one-1.536e9": ("one tensor of 1.536e9", same(1, 1_536_000_000)),
    "one-2^24": ("one tensor of 2^24", same(1, 1 << 24)),
    "one-2^26": ("one tensor of 2^26", same(1, 1 << 26)),
    **{f"host-{count}x256": (f"{count:,} tensors of 256", same(count, 256)) for count in HOST_COUNTS},
    **{f"host-{count}x8": (f"{count:,} tensors of 8", same(count, 8)) for count in HOST_COUNTS},
}

CATALOGUE = MODELS | SYNTHETIC


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
