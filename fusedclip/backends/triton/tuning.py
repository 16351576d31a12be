"""How the kernels are shaped: as measured for an architecture and a dtype, or else one default per kind of device.

A pass that is bound by memory needs enough bytes in flight: about 3.4 TB/s x 0.7 us = 2.3 MB on an H100, 18 KB per
multiprocessor. Every program has one step in flight and then works on it, so that a few times as much are kept going.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...dtypes import FLOATING, name_of

# With these, and steps of 64 KiB at most, an fp32 accumulator takes 33 additions in a tile. Those and the 7 that add
# eight accumulators to one round 39 times: 39 * 2^-24 = 2.4e-6 of a sum at most, half of that for a 2-norm.
MOST_STEPS = 16
REGISTERS = 65536  # of an NVIDIA multiprocessor
TABLE = Path(__file__).with_name("tuning.json")  # written by `python -m benchmarks tune`, read once per process


@dataclass(frozen=True)
class Tuning:
    tile_bytes: int = 64 * 1024  # one entry (8 bytes) in the table, one reduction over the program's threads
    step_bytes: int = 16 * 1024  # 8 loads of 16 bytes for each of 128 threads
    num_warps: int = 4
    programs_per_processor: int = 4  # all resident at once: one that waits for another's end would double the time
    limits: tuple[tuple[str, int], ...] = ()  # the compiler's options that make room for that many

    def __post_init__(self) -> None:
        numbers = vars(self) | dict(self.limits)
        del numbers["limits"]
        for name, value in numbers.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, not a positive integer")
        if self.num_warps & (self.num_warps - 1):
            raise ValueError(f"num_warps is {self.num_warps}, not a power of two")
        steps, rest = divmod(self.tile_bytes, self.step_bytes)
        odd_step = self.step_bytes & (self.step_bytes - 1) or not 4096 <= self.step_bytes <= 65536
        if rest or odd_step or steps > MOST_STEPS:
            raise ValueError(
                f"{self}: a tile is a whole number of steps, {MOST_STEPS} at most, and a step a power of two "
                "from 4096 to 65536 bytes"
            )

    def options(self) -> dict[str, int | bool]:
        """For the compiler.

        Without fused multiply-adds the coefficient is that of norms.py to the bit, on every version of Triton (their
        defaults differ). Reading is bound by memory: the extra instructions come for free.
        """
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **dict(self.limits)}

    def for_statistics(self) -> "Tuning":
        """The same with room for their accumulators: 4 loads of 16 bytes for each thread, and 128 registers."""
        if not self.limits:
            return self
        threads = 32 * self.num_warps
        step = min(self.step_bytes, max(4 * 16 * threads, self.tile_bytes // MOST_STEPS))
        programs = max(1, REGISTERS // (128 * threads))
        return replace(self, step_bytes=step, programs_per_processor=programs, limits=(("maxnreg", 128),))


# Not measured on any device yet: the arithmetic above, and what tests/test_triton_offline.py sees of registers.
# On an MI300 a program of 4 waves is one wave on each SIMD, and four of them leave each 128 of 512 registers.
DEFAULT = Tuning()
# 5 x 128 threads x 96 = 61,440 of 65,536 registers. Without the limit ptxas aims at 80 or 64 at times, and spills.
NVIDIA = Tuning(programs_per_processor=5, limits=(("maxnreg", 96),))
# The interpreter pays per operation and hardly per element. Three programs, so that they share tiles unevenly.
INTERPRETER = Tuning(tile_bytes=128 * 1024, step_bytes=64 * 1024, programs_per_processor=3)


@dataclass(frozen=True)
class Row:
    """One measurement: what is fastest for gradients of one dtype on one architecture."""

    architecture: str  # as architecture_of gives it
    dtype: str  # as torch names it
    tuning: Tuning
    gain: float  # time of the default / time of this one
    device: str
    triton: str
    date: str

    @property
    def key(self) -> tuple[str, str]:
        return self.architecture, self.dtype


# What `python -m benchmarks tune` makes calls run with; otherwise None.
forced: ContextVar[Tuning | None] = ContextVar("fusedclip_tuning", default=None)


@contextmanager
def use(tuning: Tuning) -> Iterator[None]:
    """Inside the context, this thread's calls run with this tuning."""
    token = forced.set(tuning)
    try:
        yield
    finally:
        forced.reset(token)


@cache
def tuning_for(device: torch.device, dtypes: frozenset[torch.dtype]) -> Tuning:
    """For a batch of these dtypes. Mixed ones are not measured: they get the default."""
    if len(dtypes) == 1:
        (dtype,) = dtypes
        row = _measured(TABLE).get((architecture_of(device), name_of(dtype)))
        if row is not None:
            return row.tuning
    return default_for(device)


def default_for(device: torch.device) -> Tuning:
    if device.type == "cpu":
        return INTERPRETER
    return NVIDIA if device.type == "cuda" and torch.version.hip is None else DEFAULT


def architecture_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...: what the compiler compiles for. The interpreter and XPUs have one for all."""
    if device.type != "cuda":
        return "interpreter" if device.type == "cpu" else device.type
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def programs_for(device: torch.device, programs_per_processor: int) -> int:
    """The size of the grid."""
    processors = 1
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        processors = properties.max_compute_units if device.type == "xpu" else properties.multi_processor_count
    return processors * programs_per_processor


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError, with the file and the row, for what cannot be a row."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if not isinstance(contents, list):
        raise ValueError(f"{path} is not a list of rows")
    rows: dict[tuple[str, str], Row] = {}
    for number, content in enumerate(contents, 1):
        try:
            row = _row(content)
            if row.key in rows:
                raise ValueError(f"there is a row for {row.dtype} on {row.architecture} already")
        except ValueError as problem:
            way_out = "remove the row, or write it with `python -m benchmarks tune`"
            raise ValueError(f"{path}, row {number}: {problem}; {way_out}") from None
        rows[row.key] = row
    return list(rows.values())


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A row a line, so that a changed row is a changed line."""
    lines = [
        json.dumps(asdict(row) | {"tuning": _as_json(row.tuning)}) for row in sorted(rows, key=lambda row: row.key)
    ]
    path.write_text("[" + ",".join(f"\n{line}" for line in lines) + "\n]\n", encoding="utf-8")


@cache
def _measured(path: Path) -> dict[tuple[str, str], Row]:
    return {row.key: row for row in read_rows(path)}


def _as_json(tuning: Tuning) -> dict[str, Any]:
    return asdict(tuning) | {"limits": dict(tuning.limits)}


def _row(content: Any) -> Row:
    _check_names(content, Row)
    tuning = content["tuning"]
    _check_names(tuning, Tuning)
    if not isinstance(tuning["limits"], dict):
        raise ValueError(f"limits is {tuning['limits']!r}, not an object")
    row = Row(**content | {"tuning": Tuning(**tuning | {"limits": tuple(tuning["limits"].items())})})
    for name in ("architecture", "dtype", "device", "triton", "date"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name} is {content[name]!r}, not a string")
    if row.dtype not in map(name_of, FLOATING):
        raise ValueError(f"dtype is {row.dtype!r}, and there are {', '.join(sorted(map(name_of, FLOATING)))}")
    if type(row.gain) not in (int, float) or not row.gain > 0:
        raise ValueError(f"gain is {row.gain!r}, not a positive number")
    return row


def _check_names(content: Any, of: type[Row] | type[Tuning]) -> None:
    names = [field.name for field in fields(of)]
    if not isinstance(content, dict) or content.keys() != set(names):
        found = ", ".join(content) if isinstance(content, dict) else repr(content)
        raise ValueError(f"a {of.__name__.lower()} has {', '.join(names)}; here is {found or 'nothing'}")
