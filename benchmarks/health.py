"""What it costs to see how the gradients are: a monitor beside clipping, and statistics beside norms."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import fusedclip
from benchmarks.gradients import Gradients
from benchmarks.measure import Settings, gradients_like, row_of
from benchmarks.results import Row
from benchmarks.suites import BOTH, Operation
from benchmarks.timing import Entry
from fusedclip.monitor import GradMonitor

CLIP, STATS, MONITOR, LOOP = "clip", "clip, statistics", "clip by a GradMonitor, per layer", "clip, .norm().item() each"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NORMS, GRAD_STATS = (
    {dtype: f"{what} of each tensor, {short}" for dtype, short in DTYPES.items()}
    for what in ("norm", "five statistics")
)


def measure(settings: Settings, seconds: float, name: str = "gpt2") -> Iterator[Row]:
    """Ways to clip and to tell of it at both limits, and norms beside statistics in each dtype; `seconds` for a row."""

    def row(operation: str, dtype: torch.dtype, ways: Callable[[Gradients], list[Entry]]) -> Row:
        gradients = gradients_like(name, str(dtype).removeprefix("torch."), settings)
        return row_of(operation, ways(gradients), gradients, settings, seconds)

    for limit in BOTH:
        yield row(f"monitor, {limit.value}", torch.float32, partial(monitored, limit))
    for dtype in DTYPES:
        yield row("statistics", dtype, partial(statistics, dtype))


def monitored(operation: Operation, gradients: Gradients) -> list[Entry]:
    parameters, limit = gradients.parameters, operation.limit(float(fusedclip.get_total_norm(gradients.tensors)))
    monitor = GradMonitor((f"layer {i}", parameter) for i, parameter in enumerate(parameters))
    ways = {
        CLIP: lambda: fusedclip.clip_grad_norm_(parameters, limit),
        STATS: lambda: fusedclip.clip_grad_norm_with_stats_(parameters, limit),
        MONITOR: lambda: monitor.clip_grad_norm_(limit),
        LOOP: lambda: (
            [gradient.norm().item() for gradient in gradients.tensors],
            fusedclip.clip_grad_norm_(parameters, limit),
        ),
    }
    return [Entry(way, call, gradients.restore) for way, call in ways.items()]


def statistics(dtype: torch.dtype, gradients: Gradients) -> list[Entry]:
    return [
        Entry(NORMS[dtype], lambda: fusedclip.get_per_tensor_norms(gradients.tensors)),
        Entry(GRAD_STATS[dtype], lambda: fusedclip.get_grad_stats(gradients.tensors)),
    ]
