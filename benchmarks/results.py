"""What a run leaves behind: one JSON file, from which tables, plots and comparisons are made."""

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
    ratio_to_foreach: float | None = None
    """torch foreach's median wall time over this one's: above 1 is faster than torch."""

    @property
    def ours(self) -> bool:
        return self.contender.startswith("fusedclip")


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
        return next((one for one in self.contenders if one.ours), None)


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
        return any(one.failure for row in self.rows for one in row.contenders if one.ours)

    def save(self, path: Path) -> None:
        """Write the JSON, whose null is what was no finite number; the environment's entries stand at its top level."""
        parts = asdict(self)
        content = {"schema": SCHEMA, **parts.pop("environment"), **parts}
        content["claims"] = [asdict(claim) | {"holds": claim.holds} for claim in self.claims]
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")  # whoever is cut off while writing leaves the file of before
        half.write_text(json.dumps(finite, indent=1) + "\n")
        half.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """A claim whose value was no finite number gets NaN, which holds nothing."""
        content = json.loads(path.read_text())
        if (schema := content.pop("schema", None)) != SCHEMA:
            raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA}; measure again")
        parts = {name: content.pop(name) for name in ("suite", "seed", "training", "gpu", "versus")}
        for row in (rows := content.pop("rows")):
            row["floor"] = Measurement(**row["floor"])
            row["contenders"] = [Measurement(**one) for one in row["contenders"]]
        for claim in (claims := content.pop("claims")):
            del claim["holds"]
            claim["value"] = math.nan if claim["value"] is None else claim["value"]
        rows, claims = [Row(**row) for row in rows], [Claim(**claim) for claim in claims]
        return cls(environment=content, rows=rows, claims=claims, **parts)
