"""What a run leaves behind: one JSON file, from which tables, plots and comparisons are made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 2


@dataclass
class Measurement:
    """One contender in one row; times are None where its output failed the oracle and it was not timed."""

    contender: str
    failure: str = ""
    norm_error: float | None = None
    ulp_error: float | None = None
    samples: int = 0
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None
    """Until the call returned; on the CPU the same as the wall time."""
    device_us: float | None = None
    """Of the device's work alone, the host running ahead; on the CPU the same as the wall time."""
    bytes_moved: int | None = None
    gb_per_s: float | None = None
    floor_fraction: float | None = None
    """Time of reading the gradients' bytes once, over the time of the call; the device's times, as GB/s are."""
    beyond_floor_us: float | None = None
    ratio_to_foreach: float | None = None
    """torch foreach's median wall time over this one's: above 1 is faster than torch."""


@dataclass
class Row:
    """One operation on one workload in one dtype, all contenders and the read floor timed in turns."""

    workload: str
    title: str
    cut: str | None
    tensors: int
    elements: int
    bytes: int
    dtype: str
    operation: str
    device: str
    threads: int
    floor: Measurement
    contenders: list[Measurement] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.workload, self.dtype, self.operation, self.device

    @property
    def is_host(self) -> bool:
        """Whether its tensors are so small that the host's own work is what it measures."""
        return self.workload.startswith("host-")

    @property
    def is_step(self) -> bool:
        """Whether its ways are of an optimizer's step, the first the base of the others, and not of the operations."""
        return self.operation.startswith(("step", "unscale"))

    @property
    def disturbance(self) -> str:
        """A warning if something else was using the machine: on an idle one a plain sum takes much the same time."""
        low, high = self.floor.p20_us, self.floor.p80_us
        # Sums of a few microseconds scatter more than this by themselves.
        if low is None or high is None or self.bytes < 1 << 18 or high < 2 * low:
            return ""
        return f"the machine was busy: a plain sum took {low:,.0f} us (p20) to {high:,.0f} us (p80)"

    def find(self, contender: str) -> Measurement | None:
        return next((one for one in self.contenders if one.contender == contender), None)

    @property
    def ours(self) -> Measurement | None:
        """fusedclip on its preferred engine: the first of its engines in the line-up."""
        return next((one for one in self.contenders if one.contender.startswith("fusedclip")), None)


@dataclass
class Claim:
    """A promise of the project beside its measured value; `note` says how it counts if not by the bar alone."""

    name: str
    value: float
    bar: float
    unit: str
    more_is_better: bool
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.value >= self.bar if self.more_is_better else self.value <= self.bar


@dataclass
class Report:
    """A whole run: where and on what it was made, the rows, the claims computed from them, the training runs."""

    environment: dict[str, Any]
    suite: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    """Of each experiment its runs with their curves: a loss and a gradient norm per step."""
    gpu: dict[str, Any] = field(default_factory=dict)
    """Of a GPU run: hashes of the kernels' sources, checks, ceilings; empty otherwise."""
    versus: dict[str, Any] = field(default_factory=dict)
    """Of a comparison of two versions: what each side was, and the times of every round; empty otherwise."""

    @property
    def wrong(self) -> bool:
        """Whether one of our engines gave a wrong answer anywhere."""
        return any(one.failure for row in self.rows for one in row.contenders if one.contender.startswith("fusedclip"))

    def save(self, path: Path) -> None:
        """Write the JSON; date, device and the like of the environment stand at its top level."""
        parts = asdict(self)
        content = {"schema": SCHEMA, **parts.pop("environment"), **parts}
        content["claims"] = [asdict(claim) | {"holds": claim.holds} for claim in self.claims]
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")  # whoever is cut off while writing leaves the file of before
        half.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
        half.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        content = json.loads(path.read_text())
        if (schema := content.pop("schema", None)) not in (1, SCHEMA):
            raise ValueError(f"{path}: schema {schema!r}, this version reads 1 and {SCHEMA}")
        steps = _rows_of_steps(content.pop("steps", []), content)
        rows = [_row(row) for row in content.pop("rows")] + steps
        claims = [_claim(claim) for claim in content.pop("claims")]
        parts = {name: content.pop(name) for name in ("suite", "seed", "training", "gpu", "versus") if name in content}
        return cls(environment=content, rows=rows, claims=claims, **parts)


def _claim(content: dict[str, Any]) -> Claim:
    """A value that JSON could not hold comes back as NaN, which holds nothing."""
    value = content["value"]
    return Claim(**{k: v for k, v in content.items() if k != "holds"} | {"value": math.nan if value is None else value})


def _row(content: dict[str, Any]) -> Row:
    floor = Measurement(**content.pop("floor"))
    contenders = [Measurement(**one) for one in content.pop("contenders")]
    return Row(**content, floor=floor, contenders=contenders)


def _rows_of_steps(steps: list[dict[str, Any]], environment: dict[str, Any]) -> list[Row]:
    """In schema 1 what clipping adds to a step was a list of its own, a line per way and limit, of GPT-2 on the CPU."""
    rows: dict[str, Row] = {}
    for one in steps:
        operation = f"{'unscale' if 'unscale' in one['way'] else 'step'}, {one['operation']}"
        size, threads = one["nbytes"], environment["threads"]
        shape = (148, size // 4, size, "float32", operation, "cpu", threads)
        row = rows.setdefault(operation, Row("gpt2", "GPT-2 124M", None, *shape, Measurement("not measured")))
        times = {name: one[name] for name in ("samples", "p20_us", "p50_us", "p80_us")}
        row.contenders.append(Measurement(one["way"], device_us=one["p50_us"], **times))
    return list(rows.values())


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
