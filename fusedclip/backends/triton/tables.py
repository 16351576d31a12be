"""What the kernels are told about a list of tensors: one int64 array on the device.

    [S]    address
    [S]    element count << DTYPE_BITS | dtype
    [T]    segment << 32 | which of that segment's tiles
    [S+1]  the first tile of each segment, and T

Everything behind the addresses follows from shapes and dtypes, and is planned once per list of them. A table belongs to
one thread and one stream: the stream's order alone keeps a new list of addresses behind the kernels that read the last
one. Host memory that a copy still reads is guarded by the events of torch's pinned allocator.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor

from ...gradients import Batch
from . import tiles
from .tuning import Tuning, forced, programs_for, tuning_for

PINS_IN_CAPTURE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
CACHED = 64  # tables per thread, plans per process; a training loop needs one of each per list that it clips

_captured: list[Tensor] = []  # host memory that a CUDA graph copies from whenever it is replayed


class Plan:
    """What follows from element counts and dtypes alone, on the host."""

    def __init__(self, counts: tuple[int, ...], dtypes: tuple[torch.dtype, ...], tile_bytes: int) -> None:
        count = _integers(counts)
        code = _integers([tiles.CODES[dtype] for dtype in dtypes])
        per_tile = _integers([tile_bytes // dtype.itemsize for dtype in dtypes])
        tiles_of = (count + per_tile - 1) // per_tile
        first = torch.cat([_integers([0]), tiles_of.cumsum(0)])
        segment = torch.repeat_interleave(tiles_of)
        index = torch.arange(len(segment), device="cpu") - first[segment]
        self.segments = len(counts)
        self.sizes = [n * dtype.itemsize for n, dtype in zip(counts, dtypes, strict=True)]  # bytes
        self.tiles = len(segment)
        self.dtypes = sum({tiles.CODES[dtype] for dtype in dtypes})
        self.rows = torch.cat([count << tiles.DTYPE_BITS.value | code, segment << 32 | index, first])


class Table:
    """A plan on a device and how its kernels are shaped, with the addresses of the tensors that it is used for."""

    def __init__(self, plan: Plan, device: torch.device, tuning: Tuning, streams: int = 1) -> None:
        self.plan = plan
        self.device = device
        self.shape = {"DTYPES": plan.dtypes, "TILE_BYTES": tuning.tile_bytes, "STEP_BYTES": tuning.step_bytes}
        self.options = tuning.options()
        self.for_statistics = tuning.for_statistics()
        self.programs = min(programs_for(device, tuning.programs_per_processor), max(plan.tiles, 1))
        self.data = torch.empty(streams * plan.segments + len(plan.rows), dtype=torch.int64, device=device)
        self.partials = torch.empty(self.programs, dtype=torch.float64, device=device)
        self.addresses: list[int] = []
        self.overlaps = False  # whether any two of the tensors share memory

    def point_to(self, addresses: list[int]) -> Tensor | None:
        """Make the table describe the tensors at these addresses, those of each stream in a row.

        Returns the host memory of the copy, if any.
        """
        if addresses == self.addresses:
            return None
        host = _integers(addresses)
        if not self.addresses:
            host = torch.cat([host, self.plan.rows])
        staged = host.pin_memory() if _may_pin(self.device) else host
        self.data[: len(host)].copy_(staged, non_blocking=True)
        self.addresses = addresses
        self.overlaps = share_memory(addresses[: self.plan.segments], self.plan.sizes)
        return staged


def _may_pin(device: torch.device) -> bool:
    """Whether a copy to the device may, and must, come from pinned memory.

    While a graph is recorded torch 2.10 has no pinned memory to give (pytorch#146924) and records a copy from ordinary
    memory, which every replay makes anew. Later versions do the opposite (pytorch#167507, #172156).
    """
    return device.type != "cpu" and (PINS_IN_CAPTURE or not is_capturing(device))


def share_memory(addresses: list[int], sizes: list[int]) -> bool:
    """For 400 tensors 50 us, but only where they have moved."""
    spans = sorted((address, address + size) for address, size in zip(addresses, sizes, strict=True) if size)
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the default device is


class _Tables(threading.local):
    def __init__(self) -> None:
        self.cached: OrderedDict[tuple[object, ...], Table] = OrderedDict()


_tables = _Tables()
_dtype_of = attrgetter("dtype")
_plan = lru_cache(maxsize=CACHED)(Plan)


def table_for(batch: Batch) -> Table:
    """The table that describes a batch, ready for kernels on the current stream.

    For 400 tensors 64 us of the host, 82 if they have moved.
    """
    counts = tuple(map(Tensor.numel, batch.tensors))
    dtypes = tuple(map(_dtype_of, batch.tensors))
    addresses = list(map(Tensor.data_ptr, batch.tensors))
    return pointed((counts, dtypes), lambda: _new_table(counts, dtypes, batch.device), batch.device, addresses)


def pointed(shape: Hashable, make: Callable[[], Table], device: torch.device, addresses: list[int]) -> Table:
    """The table of this shape, made if there is none, with these addresses: ready for kernels on the current stream."""
    if is_capturing(device):
        table = make()
        staged = table.point_to(addresses)
        assert staged is not None
        # Replays copy from here again. The device half needs no such care: it comes from the graph's own pool.
        _captured.append(staged)
        return table
    key = (shape, device, _stream(device), forced.get())
    cached = _tables.cached
    table = cached.pop(key) if key in cached else make()
    cached[key] = table  # at the end: used last
    if len(cached) > CACHED:
        cached.popitem(last=False)
    table.point_to(addresses)
    return table


def _new_table(counts: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> Table:
    tuning = forced.get() or tuning_for(device, frozenset(dtypes))
    return Table(_plan(counts, dtypes, tuning.tile_bytes), device, tuning)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return int(torch.get_device_module(device).current_stream(device).stream_id)
