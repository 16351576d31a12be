"""What clipping adds to an optimizer's step, and unscaling with clipping to nothing: under a fused AdamW.

Two kinds of rows, for both limits: "step", of which each way is the whole step and the first the step alone, and
"unscale", whose ways leave the step out.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch.nn.utils import clip_grad_norm_

import fusedclip
from benchmarks import workloads
from benchmarks.gradients import Gradients
from benchmarks.measure import Settings, row_of, time_beside_floor
from benchmarks.results import Row
from benchmarks.suites import BOTH
from benchmarks.timing import Entry
from fusedclip.amp import unscale_and_clip_grad_norm_
from fusedclip.optim import AdamW, clip_on_step

STEP, TORCH, DROP_IN = "step alone", "torch's clip", "drop-in"
SCALES, DEFERS, CHOOSES = "on step, defer=False", "on step, defer=True", "on step, defer=None"
OWN, OWN_PLAIN = "fusedclip.optim.AdamW", "fusedclip.optim.AdamW, max_norm=None"
OWN_BF16, OWN_SPLIT = "the same, bf16 moments", "the same, bf16 model, split master"
UNSCALE_TORCH, UNSCALE_OURS = "torch: unscale_ + clip", "fusedclip: unscale_and_clip"
LOSS_SCALE = 65536.0


def measure(settings: Settings, seconds: float, name: str = "gpt2") -> Iterator[Row]:
    """All ways at both limits, in turns; `seconds` for a row of steps, half of them for one of unscaling."""
    bench = _Bench(settings, name)
    for operation in BOTH:
        limit = operation.limit(bench.norm)
        yield bench.row(f"step, {operation.value}", bench.steps(limit), seconds)
        yield bench.row(f"unscale, {operation.value}", bench.unscales(limit), seconds / 2)


class _Bench:
    def __init__(self, settings: Settings, name: str) -> None:
        self.settings, self.workload = settings, workloads.load(name, 4, settings.memory)
        self.gradients = Gradients(self.workload, (torch.float32,), settings.device, settings.seed)
        self.parameters = self.gradients.parameters
        for parameter in self.parameters:
            torch.nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=True)
        self.optimizer.step()  # makes its state
        self.norm = float(fusedclip.get_total_norm(self.gradients.tensors))
        self.rounded = [torch.nn.Parameter(p.detach().bfloat16()) for p in self.parameters]
        for half, parameter in zip(self.rounded, self.parameters, strict=True):
            half.grad = None if parameter.grad is None else parameter.grad.bfloat16()
        self.owns = {
            OWN_PLAIN: AdamW(self.parameters, lr=1e-9),
            OWN: AdamW(self.parameters, lr=1e-9, max_norm=1.0),
            OWN_BF16: AdamW(self.parameters, lr=1e-9, max_norm=1.0, moments=torch.bfloat16),
            OWN_SPLIT: AdamW(self.rounded, lr=1e-9, max_norm=1.0, master="split"),
        }

        self.others = _others(self.parameters) if settings.device.type == "cpu" else {}

    def row(self, operation: str, entries: list[Entry], seconds: float) -> Row:
        row = row_of("float32", operation, self.workload, self.gradients, self.settings)
        row.floor, timed = time_beside_floor(entries, self.gradients, self.settings, seconds)
        row.contenders += timed.values()
        return row

    def steps(self, limit: float) -> list[Entry]:
        def clipping(clip: Callable[..., object]) -> Callable[[], object]:
            return lambda: (clip(self.parameters, limit), self.optimizer.step())

        def on_step(defer: bool | None) -> Callable[[], object]:
            def call() -> None:
                handle = clip_on_step(self.optimizer, limit, defer=defer)
                self.optimizer.step()
                handle.remove()  # some microseconds of the bench's own, counted against it

            return call

        def own(way: str) -> Callable[[], object]:
            optimizer = self.owns[way]
            group = optimizer.param_groups[0]

            def call() -> None:
                if way != OWN_PLAIN:
                    group["max_norm"] = limit
                optimizer.step()

            return call

        def clip_before(step: Callable[[], object]) -> Callable[[], object]:
            return lambda: (clip_grad_norm_(self.parameters, limit), step())

        ways = {
            STEP: self.optimizer.step,
            TORCH: clipping(clip_grad_norm_),
            DROP_IN: clipping(fusedclip.clip_grad_norm_),
            SCALES: on_step(False),
            DEFERS: on_step(True),
            CHOOSES: on_step(None),
            **{way: own(way) for way in self.owns},
            **{way: clip_before(step) for way, step in self.others.items()},
        }
        return [Entry(way, call, self.gradients.restore) for way, call in ways.items()]

    def unscales(self, limit: float) -> list[Entry]:
        """The gradients pass for scaled ones: the limit is that much smaller."""
        device, limit = self.settings.device, limit / LOSS_SCALE
        scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE)
        scaler.scale(torch.zeros((), device=device))

        def before() -> None:
            scaler._per_optimizer_states.clear()  # as update() does, without touching the scale
            self.gradients.restore()

        def torchs() -> None:
            scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.parameters, limit)

        def ours() -> None:
            unscale_and_clip_grad_norm_(scaler, self.optimizer, limit)

        return [Entry(UNSCALE_TORCH, torchs, before), Entry(UNSCALE_OURS, ours, before)]


def _others(parameters: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Steps of optimizers by others, as far as they are installed; torch's clip comes before them."""
    steps: dict[str, Callable[[], object]] = {}
    with suppress(Exception):  # whatever an import of it raises where it cannot be compiled
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        steps["torch's clip, DeepSpeedCPUAdam"] = DeepSpeedCPUAdam(parameters, lr=1e-9, adamw_mode=True).step
    with suppress(ImportError):
        from torchao.optim import _AdamW

        steps["torch's clip, torchao _AdamW"] = _AdamW(parameters, lr=1e-9).step
    return steps
