"""What a run leaves behind: one JSON file, from which tables, plots and comparisons are made."""

import json
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Any

SCHEMA = 2


@dataclass
class Measurement:
    """One contender in one row. What is not known is NaN, which passes no comparison, and null in the file: the times
    where its output failed the oracle and it was not timed.
    """

    contender: str
    failure: str = ""
    norm_error: float = nan
    ulp_error: float = nan
    samples: int = 0
    p20_us: float = nan
    p50_us: float = nan
    p80_us: float = nan
    host_us: float = nan  # until the call returned; on the CPU the same as the wall time
    device_us: float = nan  # of the device's work alone, the host running ahead; on the CPU the same as the wall time
    bytes_moved: float = nan
    gb_per_s: float = nan  # by the device's time
    floor_fraction: float = nan  # time of reading the gradients' bytes once, over the call's; both the device's
    ratio_to_foreach: float = nan  # torch foreach's median wall time over this one's: above 1 is faster than torch

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
    def is_step(self) -> bool:
        """Whether its contenders are ways of doing more than one operation, the first the base of the others."""
        return self.operation.startswith(("step", "unscale", "monitor", "statistics"))

    @property
    def disturbance(self) -> str:
        """A warning if something else was using the machine: on an idle one a plain sum takes much the same time."""
        low, high = self.floor.p20_us, self.floor.p80_us
        # Sums of a few microseconds scatter more than this by themselves.
        busy = high >= 2 * low and self.bytes >= 1 << 18
        return f"the machine was busy: a plain sum took {low:,.0f} us (p20) to {high:,.0f} us (p80)" if busy else ""

    def find(self, contender: str) -> Measurement:
        """Of one that takes no part nothing is known."""
        return next((one for one in self.contenders if one.contender == contender), Measurement(contender))

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
    # Of each experiment its runs with their curves: a loss and a gradient norm per step.
    training: dict[str, Any] = field(default_factory=dict)
    # Of a GPU run: hashes of the kernels' sources, checks, ceilings; empty otherwise.
    gpu: dict[str, Any] = field(default_factory=dict)
    # Of a comparison of two versions: what each side was, and the times of every round; empty otherwise.
    versus: dict[str, Any] = field(default_factory=dict)

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
        content = json.loads(path.read_text())
        if (schema := content.pop("schema", None)) != SCHEMA:
            raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA}; measure again")
        parts = {name: content.pop(name) for name in ("suite", "seed", "training", "gpu", "versus")}
        rows = [Row(**row) for row in content.pop("rows")]
        for row in rows:
            row.floor, *row.contenders = (Measurement(**_known(one)) for one in [row.floor, *row.contenders])
        claims = [Claim(**_known(claim)) for claim in content.pop("claims")]
        return cls(environment=content, rows=rows, claims=claims, **parts)


def _known(numbers: Any) -> dict[str, Any]:
    """Of a measurement or a claim as it is in the file; whether a claim holds follows from the rest."""
    return {name: nan if value is None else value for name, value in numbers.items() if name != "holds"}
