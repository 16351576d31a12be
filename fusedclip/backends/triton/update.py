"""From an optimizer's streams to launches: two for each mixture of dtypes in a param group."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dtypes import LIST
from ...updates import UpdateRule
from ..base import on
from ..updater import Streams
from . import update_kernels as kernels
from .launch import launch
from .tables import Plan, Table, pointed, share_memory
from .tuning import Tuning, default_for

PLACES = {dtype: place for place, dtype in enumerate(LIST)}
STEPS_PER_TILE = 8
_KEPT = {torch.float32: kernels.WHOLE.value, torch.float16: kernels.SPLIT.value}

Mixture = tuple[int, int, torch.dtype, tuple[int, ...]]  # row, what is kept, the parameter's dtype, those of TYPES


def update_(streams: Streams, rules: Sequence[UpdateRule], coefs: Tensor, skip: Tensor | None) -> None:
    mixtures: dict[Mixture, list[int]] = {}
    for place in range(len(streams.parameters)):
        mixtures.setdefault(_mixture(streams, place), []).append(place)
    with on(streams.device):
        for mixture, places in mixtures.items():
            _update(streams, mixture, places, rules[mixture[0]], coefs[mixture[0]], skip)


def overlap(tensors: list[Tensor]) -> bool:
    return share_memory([t.data_ptr() for t in tensors], [t.numel() * t.itemsize for t in tensors])


def step_of(tuning: Tuning) -> int:
    """Elements that a program takes at a time: 4 for each thread, 16 bytes of fp32; twice as many would spill."""
    return tuning.step_bytes // 16


def _mixture(streams: Streams, place: int) -> Mixture:
    parameter, master = streams.parameters[place], streams.masters[place]
    tensors = (parameter, streams.gradients[place], *(state[place] for state in streams.states))
    kept = 0 if master is None else _KEPT[master.dtype]
    return streams.rows[place], kept, parameter.dtype, tuple(PLACES[tensor.dtype] for tensor in tensors)


def _update(
    streams: Streams, mixture: Mixture, places: list[int], rule: UpdateRule, coef: Tensor, skip: Tensor | None
) -> None:
    _, kept, dtype, types = mixture
    lists: list[list[Tensor]] = [streams.parameters, streams.gradients, *streams.states]
    if kept:
        lists.append(streams.masters)  # type: ignore[arg-type]
    if streams.steps is not None:
        lists.append(streams.steps)
    addresses = [stream[place].data_ptr() for stream in lists for place in places]
    counts = tuple(streams.parameters[place].numel() for place in places)
    tuning = default_for(streams.device).for_statistics()  # registers for several streams
    step = step_of(tuning)

    def make() -> Table:
        plan = Plan(counts, (dtype,) * len(counts), STEPS_PER_TILE * step * dtype.itemsize)
        return Table(plan, streams.device, tuning, len(lists))

    table = pointed(("update", counts, dtype, len(lists)), make, streams.device, addresses)
    prepared = torch.empty(len(places), kernels.NUMBERS.value, dtype=torch.float64, device=streams.device)
    lr, *options = rule[:-2]
    on_device = lr if isinstance(lr, Tensor) else None
    launch(
        kernels.prepare_kernel,
        len(places),
        table,
        table.data,
        prepared,
        coef,
        skip,
        on_device,
        0.0 if on_device is not None else lr,
        *(options + [0.0] * (4 - len(options))),
        len(places),
        KIND=rule.kind,
        MAXIMIZE=rule.maximize,
        IN_DOUBLE=dtype == torch.float64,
        STEPS=None if streams.steps is None else len(lists) - 1,
    )
    launch(
        kernels.update_kernel,
        table.programs,
        table,
        table.data,
        prepared,
        skip,
        len(places),
        table.plan.tiles,
        KIND=rule.kind,
        TYPES=types,
        KEPT=kept,
        STREAMS=len(lists),
        STEP=step,
        TILE=STEPS_PER_TILE * step,
    )
