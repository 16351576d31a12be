"""Checks that run in a process of their own, with a limit of time; what they print last is kept."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import ROOT

LINES_KEPT = 25
TESTS_SECONDS, SANITIZER_SECONDS = 210.0, 60.0
EXAMPLES = "50"  # per property test: the Triton engine compiles kernels for new kinds of lists as it meets them
SANITIZERS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "initcheck": ()}


@dataclass(frozen=True)
class Check:
    """`outcome`: passed, failed, timed out or left out; `told`: the end of what it printed, or the reason."""

    name: str
    outcome: str
    seconds: float = 0.0
    told: str = ""

    @property
    def bad(self) -> bool:
        return self.outcome in ("failed", "timed out")


def build(device: torch.device) -> Check:
    """The compiled engine for this device is there and serves it."""
    from fusedclip import backends

    explained = backends.explain()
    home = next((line for line in explained.splitlines() if line.startswith(device.type)), "")
    return Check("build", "passed" if "preferred on" in home else "failed", told=explained)


def tests() -> Check:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return run("tests", command, TESTS_SECONDS, {"FUSEDCLIP_EXAMPLES": EXAMPLES})


def sanitizers() -> Iterator[Check]:
    """compute-sanitizer over a few calls of everything, once per tool."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for tool, options in SANITIZERS.items():
        name = f"compute-sanitizer {tool}"
        if program is None:
            yield Check(name, "left out", told="compute-sanitizer is not installed")
            continue
        command = [program, "--tool", tool, *options, "--error-exitcode", "1"]
        command += [sys.executable, "-m", "tests.sanitizer_script"]
        yield run(name, command, SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def run(name: str, command: Sequence[str], seconds: float, variables: Mapping[str, str], where: Path = ROOT) -> Check:
    """Run it in `where`; its whole process group ends with it, or when the seconds are over."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=where,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        outcome = "failed" if process.returncode else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        printed, _ = process.communicate()
        outcome = "timed out"
    told = "\n".join(printed.splitlines()[-LINES_KEPT:])
    return Check(name, outcome, round(time.perf_counter() - start, 1), told)
