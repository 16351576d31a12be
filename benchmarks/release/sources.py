"""Which kernels a GPU result was measured on: the hash of each file that a kernel or its launch is made from."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT

PATTERNS = (
    "csrc/CMakeLists.txt",
    "csrc/*.h",
    "csrc/cuda/*",
    "fusedclip/backends/cuda.py",
    "fusedclip/backends/triton/*.py",
    "fusedclip/backends/triton/tuning.json",
)
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = ("build", "tests")  # checks without which a result covers nothing


def hashes(root: Path = ROOT) -> dict[str, str]:
    """sha256 of every source file, by its path in the repository."""
    paths = sorted({path for pattern in PATTERNS for path in root.glob(pattern) if path.is_file()})
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@dataclass(frozen=True)
class Status:
    """What became of each file since the newest result, and the checks that it lacks."""

    result: Path
    measured_on: str
    files: dict[str, str]  # "as measured", "changed", "new" or "gone"
    lacks: list[str]

    @property
    def covered(self) -> bool:
        return not self.lacks and all(state == "as measured" for state in self.files.values())


def status(results: Path = RESULTS, root: Path = ROOT) -> Status | None:
    """Of the GPU result with the latest date below this folder; None if there is none at all."""
    contents = {path: json.loads(path.read_text()) for path in sorted(results.rglob("*.json"))}
    found = {path: one for path, one in contents.items() if isinstance(one, dict) and one.get("gpu", {}).get("sources")}
    if not found:
        return None
    path = max(found, key=lambda path: str(found[path]["date"]))
    gpu, now = found[path]["gpu"], hashes(root)
    then = gpu["sources"]
    states = {name: "new" if name not in then else "gone" if name not in now else "changed" for name in then | now}
    states |= dict.fromkeys(dict(then.items() & now.items()), "as measured")
    outcomes = {check["name"]: check["outcome"] for check in gpu.get("checks", [])}
    lacks = [f"{name}: {outcomes.get(name, 'left out')}" for name in NEEDED if outcomes.get(name) != "passed"]
    return Status(path, f"{found[path]['device']}, {found[path]['date']}", dict(sorted(states.items())), lacks)


def summary(found: Status | None) -> str:
    if found is None:
        return "There are no GPU results yet: python -m benchmarks gpu --out benchmarks/results/DEVICE makes them."
    width = max(map(len, found.files))
    lines = [f"{name:<{width}}  {state}" for name, state in found.files.items()]
    lines += [f"the check {lack}" for lack in found.lacks]
    verdict = "cover the kernels as they are" if found.covered else "do NOT cover the kernels as they are"
    return "\n".join([*lines, "", f"The newest GPU results {verdict} ({found.result}: {found.measured_on})."])
