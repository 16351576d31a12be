"""What clipping adds to an optimizer's step, and unscaling with clipping to nothing: GPT-2 124M under a fused AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import fusedclip
from benchmarks import workloads
from benchmarks.gradients import Gradients
from benchmarks.results import Claim
from benchmarks.table import duration, markdown
from benchmarks.timing import Budget, Entry, Samples, clock_for, flusher, quantiles_us, take_turns
from fusedclip.amp import unscale_and_clip_grad_norm_
from fusedclip.optim import clip_on_step

STEP, TORCH, DROP_IN = "step alone", "torch's clip", "drop-in"
SCALES, DEFERS, CHOOSES = "on step, defer=False", "on step, defer=True", "on step, defer=None"
UNSCALE_TORCH, UNSCALE_OURS = "torch: unscale_ + clip", "fusedclip: unscale_and_clip"
# Like operations.py: far from the norm, and no power of two as coefficient.
LIMITS = {"not clipped": 2.0, "clipped": 0.6180339887}
WORST_STEP = {"not clipped": 1.35, "clipped": 1.45}  # (clip + step) / step, best way
LEAST_UNSCALE = 1.6  # torch's two calls / ours
LOSS_SCALE = 65536.0


@dataclass(frozen=True)
class Timed:
    """One way at one limit: quantiles of a call, and its median over that of the bare step (of torch's two calls).

    The device's own times: in training the host runs ahead of it.
    """

    way: str
    operation: str
    samples: int
    p20_us: float
    p50_us: float
    p80_us: float
    ratio: float
    nbytes: int


def measure(device: torch.device, seconds: float, seed: int, workload: str = "gpt2") -> list[Timed]:
    """All ways at both limits, in turns."""
    bench = _Bench(device, seed, workload)
    found = []
    for operation, factor in LIMITS.items():
        limit = factor * bench.norm
        steps = take_turns(bench.steps(limit), clock_for(device), Budget(seconds), seed)
        unscales = take_turns(bench.unscales(limit), clock_for(device), Budget(seconds / 2), seed)
        nbytes = bench.gradients.nbytes
        found += _timed(steps, operation, STEP, nbytes) + _timed(unscales, operation, UNSCALE_TORCH, nbytes)
    return found


class _Bench:
    def __init__(self, device: torch.device, seed: int, workload: str) -> None:
        self.device = device
        self.gradients = Gradients(workloads.load(workload, 4), (torch.float32,), device, seed)
        self.parameters = self.gradients.parameters
        for parameter in self.parameters:
            torch.nn.init.zeros_(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=True)
        self.optimizer.step()  # makes its state
        self.norm = float(fusedclip.get_total_norm(self.gradients.tensors))
        self._flush = flusher(device, self.gradients.nbytes)

    def _before(self) -> None:
        self.gradients.restore()
        self._flush()

    def steps(self, limit: float) -> list[Entry]:
        def clipping(clip: Callable[..., object]) -> Callable[[], object]:
            return lambda: (clip(self.parameters, limit), self.optimizer.step())

        def on_step(defer: bool | None) -> Callable[[], object]:
            def call() -> None:
                handle = clip_on_step(self.optimizer, limit, defer=defer)
                self.optimizer.step()
                handle.remove()  # some microseconds of the bench's own, counted against it

            return call

        ways = {
            STEP: self.optimizer.step,
            TORCH: clipping(clip_grad_norm_),
            DROP_IN: clipping(fusedclip.clip_grad_norm_),
            SCALES: on_step(False),
            DEFERS: on_step(True),
            CHOOSES: on_step(None),
        }
        return [Entry(way, call, self._before) for way, call in ways.items()]

    def unscales(self, limit: float) -> list[Entry]:
        """The gradients pass for scaled ones: the limit is that much smaller."""
        scaler = torch.amp.GradScaler(self.device.type, init_scale=LOSS_SCALE)
        scaler.scale(torch.zeros((), device=self.device))
        limit = limit / LOSS_SCALE

        def before() -> None:
            scaler._per_optimizer_states.clear()  # as update() does, without touching the scale
            self._before()

        def torchs() -> None:
            scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.parameters, limit)

        def ours() -> None:
            unscale_and_clip_grad_norm_(scaler, self.optimizer, limit)

        return [Entry(UNSCALE_TORCH, torchs, before), Entry(UNSCALE_OURS, ours, before)]


def _timed(samples: dict[str, Samples], operation: str, base: str, nbytes: int) -> list[Timed]:
    medians = {way: quantiles_us(one.device) for way, one in samples.items()}
    return [
        Timed(way, operation, len(samples[way].wall), *quantiles, quantiles[1] / medians[base][1], nbytes)
        for way, quantiles in medians.items()
    ]


def claims(timed: list[Timed]) -> list[Claim]:
    found = []
    for operation, bar in WORST_STEP.items():
        of = {one.way: one for one in timed if one.operation == operation}
        best = min((of[way] for way in (DROP_IN, SCALES, DEFERS, CHOOSES)), key=lambda one: one.ratio)
        note = f"{best.way}; torch's clip: {of[TORCH].ratio:.2f}"
        found.append(Claim(f"(clip + step) / step, {operation}", best.ratio, bar, "x", False, note))
        faster = 1 / of[UNSCALE_OURS].ratio
        found.append(Claim(f"torch's unscale_ + clip / ours, {operation}", faster, LEAST_UNSCALE, "x", True))
    return found


def table(timed: list[Timed]) -> str:
    """A line per way: times, and the ratio to the step alone (of the last two lines: to torch's calls)."""
    rows = []
    for way in dict.fromkeys(one.way for one in timed):
        cells = {one.operation: one for one in timed if one.way == way}
        rows.append([way, *(f(cells[o]) for o in LIMITS for f in (_time, _ratio))])
    return markdown(["", *(title for o in LIMITS for title in (o, "ratio"))], rows)


def _time(one: Timed) -> str:
    return duration(one.p50_us)


def _ratio(one: Timed) -> str:
    return f"{one.ratio:.2f}"


def as_json(timed: list[Timed]) -> list[dict[str, Any]]:
    return [asdict(one) for one in timed]
