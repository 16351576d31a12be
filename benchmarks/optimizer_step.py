"""What clipping adds to an optimizer's step, and unscaling with clipping to nothing: under a fused AdamW and our own.

Two kinds of rows, for both limits: "step", of which each way is the whole step and the first the step alone, and
"unscale", whose ways leave the step out.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import nan

import torch
from torch.nn.utils import clip_grad_norm_

import fusedclip
from benchmarks.measure import Settings, gradients_like, row_of
from benchmarks.results import Row
from benchmarks.suites import BOTH, Operation
from benchmarks.timing import Entry
from fusedclip.amp import unscale_and_clip_grad_norm_
from fusedclip.optim import AdamW, clip_on_step

STEP, TORCH, DROP_IN = "step alone", "torch's clip", "drop-in"
SCALES, DEFERS, CHOOSES = "on step, defer=False", "on step, defer=True", "on step, defer=None"
OWN = "fusedclip.optim.AdamW"
OWN_BF16, OWN_SPLIT = f"{OWN}, bf16 moments", f"{OWN}, bf16 model, split master"
NO_LIMIT = ", no limit"  # the step of that optimizer alone
UNSCALE_TORCH, UNSCALE_OURS = "torch: unscale_ + clip", "fusedclip: unscale_and_clip"
LOSS_SCALE = 65536.0
# Bytes per parameter where nothing is clipped, and where something is: parameter, gradient and two moments are read and
# all but the gradient written; a norm reads the gradient once more, scaling it moves it twice, deferring writes it.
BYTES = {
    STEP: (28, 28), TORCH: (40, 40), DROP_IN: (32, 40), SCALES: (32, 40),
    OWN: (32, 32), OWN_BF16: (24, 24), OWN_SPLIT: (28, 28),
    OWN + NO_LIMIT: (28, 28), OWN_BF16 + NO_LIMIT: (20, 20), OWN_SPLIT + NO_LIMIT: (26, 26),
}  # fmt: skip
# Only on a CPU is it known in time that nothing is clipped, and there deferring is what is chosen.
BYTES_DEFERRED, BYTES_CHOSEN = {"cpu": (32, 36), "cuda": (36, 36)}, {"cpu": (32, 36), "cuda": (32, 40)}
MODEL, SMALL = "gpt2", "2000x1024"  # where nobody asks for another: the second is many small parameters
Call = Callable[..., object]


def measure(settings: Settings, seconds: float, *names: str) -> Iterator[Row]:
    """All ways at both limits, in turns; `seconds` for a row of steps, half of them for one of unscaling. Of SMALL, of
    which what counts is how often something is launched, the steps alone, in a third.
    """
    for name in names or (MODEL, SMALL):
        bench = _Bench(settings, name)
        for operation in BOTH:
            yield bench.steps(operation, seconds / 3 if name == SMALL else seconds)
            if name != SMALL:
                yield bench.unscales(operation, seconds / 2)


class _Bench:
    def __init__(self, settings: Settings, name: str) -> None:
        self.settings, self.gradients = settings, gradients_like(name, "float32", settings)
        self.parameters = self.gradients.parameters
        for parameter in self.parameters:
            torch.nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=True)
        self.optimizer.step()  # makes its state
        self.norm = float(fusedclip.get_total_norm(self.gradients.tensors))
        rounded = [torch.nn.Parameter(p.detach().bfloat16()) for p in self.parameters]
        for half, parameter in zip(rounded, self.parameters, strict=True):
            half.grad = None if parameter.grad is None else parameter.grad.bfloat16()
        self.owns = {
            OWN: AdamW(self.parameters, lr=1e-9),
            OWN_BF16: AdamW(self.parameters, lr=1e-9, moments=torch.bfloat16),
            OWN_SPLIT: AdamW(rounded, lr=1e-9, master="split"),
        }
        self.others = _others(self.parameters) if settings.device.type == "cpu" else {}

    def steps(self, operation: Operation, seconds: float) -> Row:
        limit, step = operation.limit(self.norm), self.optimizer.step

        def after(clip: Call, step: Call = step) -> None:
            clip(self.parameters, limit)
            step()

        def on_step(defer: bool | None) -> None:
            handle = clip_on_step(self.optimizer, limit, defer=defer)
            step()
            handle.remove()  # some microseconds of the bench's own, counted against it

        def own(optimizer: AdamW, max_norm: float | None) -> None:
            optimizer.param_groups[0]["max_norm"] = max_norm
            optimizer.step()

        ways: dict[str, Call] = {
            STEP: step,
            TORCH: partial(after, clip_grad_norm_),
            DROP_IN: partial(after, fusedclip.clip_grad_norm_),
            SCALES: partial(on_step, False),
            DEFERS: partial(on_step, True),
            CHOOSES: partial(on_step, None),
        }
        for way, optimizer in self.owns.items():
            ways |= {way + NO_LIMIT: partial(own, optimizer, None), way: partial(own, optimizer, limit)}
        for way, other in self.others.items():
            ways |= {way + NO_LIMIT: other, way: partial(after, clip_grad_norm_, other)}
        kind, which = self.settings.device.type, BOTH.index(operation)
        moved = BYTES | {DEFERS: BYTES_DEFERRED[kind], CHOOSES: BYTES_CHOSEN[kind]}
        passes = {way: moved[way][which] / 4 for way in ways if way in moved}
        before = self.gradients.restore
        entries = [Entry(way, call, before, passes=passes.get(way, nan)) for way, call in ways.items()]
        return row_of(f"step, {operation.value}", entries, self.gradients, self.settings, seconds)

    def unscales(self, operation: Operation, seconds: float) -> Row:
        """The gradients pass for scaled ones: the limit is that much smaller."""
        device, limit = self.settings.device, operation.limit(self.norm) / LOSS_SCALE
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

        entries = [Entry(UNSCALE_TORCH, torchs, before), Entry(UNSCALE_OURS, ours, before)]
        return row_of(f"unscale, {operation.value}", entries, self.gradients, self.settings, seconds)


def _others(parameters: list[torch.nn.Parameter]) -> dict[str, Call]:
    """Steps of optimizers by others, as far as they are installed; torch's clip comes before them."""
    steps: dict[str, Call] = {}
    with suppress(Exception):  # whatever an import of it raises where it cannot be compiled
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        steps["torch's clip, DeepSpeedCPUAdam"] = DeepSpeedCPUAdam(parameters, lr=1e-9, adamw_mode=True).step
    with suppress(ImportError):
        from torchao.optim import _AdamW

        steps["torch's clip, torchao _AdamW"] = _AdamW(parameters, lr=1e-9).step
    return steps
