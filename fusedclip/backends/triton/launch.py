"""From a batch to launches: which kernel, with which table, on which device. Nothing here waits for the device."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...gradients import Batch
from ...norms import STATS, Clipped, ClipRule
from ...transfers import follow
from ..base import on
from . import kernels
from .norms import number_of
from .tables import Table, table_for
from .tuning import programs_for


def lift(batch: Batch, p: float) -> Tensor:
    with on(batch.device):
        table = table_for(batch)
        partials = _empty(batch, max(table.plan.tiles, 1))
        out = _empty(batch, table.plan.segments)
        _read(table, partials, p, per_tile=True)
        _launch_per_segment(kernels.per_tensor_kernel, table, partials, out, NORM=number_of(p))
    return out


def stats(batch: Batch) -> Tensor:
    with on(batch.device):
        table = table_for(batch)
        plan = table.plan
        partials = _empty(batch, STATS, plan.tiles)
        out = _empty(batch, STATS, plan.segments)
        tuning = table.for_statistics
        launch(
            kernels.stats_kernel,
            min(programs_for(batch.device, tuning.programs_per_processor), max(plan.tiles, 1)),
            table,
            table.data,
            partials,
            plan.segments,
            plan.tiles,
            **(table.shape | {"STEP_BYTES": tuning.step_bytes} | tuning.options()),
        )
        _launch_per_segment(kernels.per_tensor_stats_kernel, table, partials, out)
    return out


def norm(batch: Batch, p: float, dtype: torch.dtype) -> Tensor:
    with on(batch.device):
        table = table_for(batch)
        out = torch.empty((), dtype=dtype, device=batch.device)
        _read(table, table.partials, p, per_tile=False)
        launch(kernels.norm_kernel, 1, table, table.partials, out, p, table.programs, NORM=number_of(p))
    return out


def clip_(
    batch: Batch, p: float, rule: ClipRule, dtype: torch.dtype, multiplier: Tensor | None, lifted: Tensor | None
) -> Clipped:
    limit = rule.max_norm
    on_device = None if isinstance(limit, float) else follow(limit, batch.device)
    with on(batch.device):
        table = table_for(batch)
        clipped = Clipped(torch.empty((), dtype=dtype, device=batch.device), _empty(batch))
        if lifted is None:
            _read(table, table.partials, p, per_tile=False)
        launch(
            kernels.settle_and_scale_kernel,
            table.programs,
            table,
            table.data,
            table.partials if lifted is None else lifted,
            clipped.norm,
            clipped.coef,
            limit if isinstance(limit, float) else math.inf,
            on_device,
            multiplier,
            p,
            table.plan.segments,
            0 if table.overlaps else table.plan.tiles,
            table.programs if lifted is None else 1,
            EPS=rule.eps,
            NORM=number_of(p),
            ZEROS=rule.zero_nonfinite,
            **table.shape,
        )
    if table.overlaps:
        scale_(batch, clipped.coef, zero=rule.zero_nonfinite)
    return clipped


def scale_(batch: Batch, coef: Tensor, *, zero: bool) -> None:
    with on(batch.device):
        table = table_for(batch)
        if table.overlaps:
            for part, c in zip(_one_by_one(batch), coef.expand(len(batch.tensors)), strict=True):
                scale_(part, c, zero=zero)
            return
        _launch_over_tiles(kernels.scale_kernel, table, coef.contiguous(), PER_TENSOR=coef.dim(), ZEROS=zero)


def clamp_(batch: Batch, bound: float) -> None:
    with on(batch.device):
        table = table_for(batch)
        if table.overlaps:
            for part in _one_by_one(batch):
                clamp_(part, bound)
            return
        _launch_over_tiles(kernels.clamp_kernel, table, bound)


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    """For writing tensors that share memory: programs would race, a launch for each is put in order by the stream."""
    return (Batch([tensor], batch.device) for tensor in batch.tensors)


def _read(table: Table, partials: Tensor, p: float, *, per_tile: bool) -> None:
    _launch_over_tiles(kernels.read_kernel, table, partials, p, NORM=number_of(p), PER_TILE=per_tile)


def _launch_over_tiles(kernel: Any, table: Table, *arguments: object, **constants: object) -> None:
    """Of a kernel that reads or writes gradients."""
    segments, tiles = table.plan.segments, table.plan.tiles
    launch(kernel, table.programs, table, table.data, *arguments, segments, tiles, **(table.shape | constants))


def _launch_per_segment(kernel: Any, table: Table, *arguments: object, **constants: object) -> None:
    """Of a kernel that finishes what those left, a program for each segment."""
    segments, tiles = table.plan.segments, table.plan.tiles
    launch(kernel, segments, table, table.data, *arguments, segments, tiles, **constants)


def launch(kernel: Any, programs: int, table: Table, *arguments: object, **constants: object) -> None:
    """Every launch of this engine."""
    kernel[(programs,)](*arguments, **(table.options | constants))


def _empty(batch: Batch, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=batch.device)
