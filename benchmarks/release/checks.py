"""Checks in processes of their own, with a limit of time. What they print goes to one file, its end into the report."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT

LINES_KEPT = 25
LOG = "checks.log"
EXAMPLES = "50"  # per property test: the Triton engine compiles kernels for new kinds of lists as it meets them
SCRIPT = (sys.executable, "-m", "tests.sanitizer_script")
# The tools of compute-sanitizer, and what each prints if it has looked and found nothing.
SANITIZERS = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
    "initcheck": "ERROR SUMMARY: 0 errors",
}
# torch asks the driver things that it may refuse; loading torch can take longer than the default 10 s.
SANITIZER_OPTIONS = ("--report-api-errors", "no", "--launch-timeout", "60", "--error-exitcode", "1")


@dataclass(frozen=True)
class Check:
    """`outcome`: passed, failed, timed out or left out; `output`: the end of what it printed, or the reason."""

    name: str
    outcome: str
    seconds: float = 0.0
    output: str = ""

    @property
    def bad(self) -> bool:
        return self.outcome in ("failed", "timed out")


@dataclass(frozen=True)
class Task:
    """A check to be run: its command, variables, longest time, and a text without which it has not passed."""

    name: str
    command: Sequence[str]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)
    proof: str = ""


def build(device: torch.device) -> Check:
    """The compiled engine for this device is there and serves it."""
    from fusedclip import backends

    explained = backends.explain()
    home = next((line for line in explained.splitlines() if line.startswith(device.type)), "")
    return Check("build", "passed" if "preferred on" in home else "failed", output=explained)


def smoke() -> Task:
    """Every kernel a few times, before anything is measured in the process that keeps the results."""
    return Task("smoke", SCRIPT, 60.0)


def tests() -> Task:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]  # one that hangs names itself
    return Task("tests", command, 210.0, {"FUSEDCLIP_EXAMPLES": EXAMPLES, "OMP_NUM_THREADS": "2"})


def sanitizers() -> list[Task | Check]:
    """compute-sanitizer over a few calls of everything, once per tool."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return [Check("compute-sanitizer", "left out", output="compute-sanitizer is not installed")]
    how, variables = [*SANITIZER_OPTIONS, *SCRIPT], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Task(f"compute-sanitizer {tool}", [program, "--tool", tool, *how], 90.0, variables, proof)
        for tool, proof in SANITIZERS.items()
    ]


def run(task: Task, logs: Path, most_seconds: float = float("inf")) -> Check:
    """Run it; its whole process group ends with it, or when the seconds are over."""
    seconds, start = min(task.seconds, most_seconds), time.perf_counter()
    if seconds <= 0:
        return Check(task.name, "left out", output="no time was left for it")
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / LOG).open("a+b") as file:
        file.write(f"== {task.name} ==\n".encode())
        file.flush()
        begin = file.tell()
        how: Any = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(task.command, cwd=ROOT, env=os.environ | task.variables, **how)
        try:
            outcome = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # stuck in the driver: it is left behind
                process.wait(20)
        file.seek(begin)
        printed = file.read().decode(errors="replace")
    if outcome == "passed" and task.proof not in printed:
        outcome = "failed"
    output = "\n".join(printed.splitlines()[-LINES_KEPT:])
    return Check(task.name, outcome, round(time.perf_counter() - start, 1), output)
