"""python -m benchmarks gpu: one stage after another, the JSON written after each row and each check, so that a run that
is cut short leaves what it has.
"""

import faulthandler
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import environment, optimizer_step
from benchmarks.contenders import OURS, line_up
from benchmarks.gpu import STAGES, ceilings
from benchmarks.measure import Settings, run_suite
from benchmarks.release import bars, checks, sources
from benchmarks.release.checks import Check, Task
from benchmarks.results import Report
from benchmarks.suites import Suite, select
from benchmarks.workloads import GIB

FILE = "gpu.json"
CEILING_SECONDS, STEP_SECONDS = 4.0, 5.0
STEP_WORKLOAD = "gpt2-xl"  # six of its layers are 1.1 GB


@dataclass(frozen=True)
class Plan:
    """What to measure on and for how long; `progress` hears what is being done."""

    device: torch.device
    suite: Suite
    everyone: Suite
    seed: int
    memory: int
    divisor: float
    """What the seconds of other measurements are divided by: 3 for a quick run."""
    progress: Callable[[str], object]


def plan(device: torch.device, seed: int, memory: float, quick: bool, progress: Callable[[str], object]) -> Plan:
    suite, everyone = (select(name, quick=quick) for name in ("gpu", "gpu-everyone"))
    return Plan(device, suite, everyone, seed, int(memory * GIB), 3.0 if quick else 1.0, progress)


def served(device: torch.device) -> torch.device:
    """This GPU, with its number, as the current device."""
    if device.type != "cuda":
        raise ValueError(f"this measures NVIDIA GPUs, not {device.type}; python -m benchmarks run measures others")
    if not torch.cuda.is_available():
        build = "is a build without CUDA" if torch.version.cuda is None else "finds none"
        raise ValueError(f"there is no GPU here that torch can use: torch {torch.__version__} {build}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def run_all(plan: Plan, folder: Path, minutes: float, stages: Sequence[str] = STAGES) -> Report:
    """The stages in order. What one of them raises is kept as a failed check, and the others go on.

    Once the minutes are over no stage is begun, and what hangs is ended, with its stack on stderr.
    """
    report = Report(environment.describe(plan.device), "gpu", plan.seed)
    files = sources.hashes()
    report.gpu = {"sources": files, "sources_digest": sources.digest(files), "checks": []}
    run = Run(plan, report, folder, time.monotonic() + 60 * minutes)
    faulthandler.dump_traceback_later(60 * minutes + 30, exit=True)
    try:
        for name in stages:
            plan.progress(name)
            run.stage(name)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return report


def failed(report: Report) -> bool:
    """Whether a check failed or one of our engines gave a wrong answer."""
    return report.wrong or any(Check(**check).bad for check in report.gpu["checks"])


@dataclass
class Run:
    """A plan on its way: the report so far, the folder that it is written to, and when time is up.

    The stages are the methods of their names.
    """

    plan: Plan
    report: Report
    folder: Path
    deadline: float
    without: set[str] = field(default_factory=set)
    """Contenders whose kernels are not to be trusted with the process that keeps the results."""

    def stage(self, name: str) -> None:
        if self.deadline <= time.monotonic():
            return self.add(Check(name, "left out", output="no time was left for it"))
        try:
            getattr(self, name)()
        except Exception:  # whatever it was: a GPU may be at hand for a short time, and the other stages can run
            self.add(Check(name, "failed", output=traceback.format_exc()))
        return self.save()

    def build(self) -> None:
        self.add(checks.build(self.plan.device))

    def smoke(self) -> None:
        """A kernel that hangs or writes where it should not must not do so in this process."""
        if self.check(checks.smoke()).bad:
            self.without.add(f"{OURS} cuda")

    def ceilings(self) -> None:
        seconds = CEILING_SECONDS / self.plan.divisor
        self.report.gpu["ceilings"] = asdict(ceilings.measure(self.plan.device, seconds, self.plan.seed))

    def rows(self) -> None:
        self.measure(self.plan.suite)

    def everyone(self) -> None:
        """torch's loop and torch.compile beside the others, on one model: both take long for their turns."""
        self.measure(self.plan.everyone, compiled=True)

    def steps(self) -> None:
        settings = Settings(self.plan.device, seed=self.plan.seed)
        self.report.rows += optimizer_step.measure(settings, STEP_SECONDS / self.plan.divisor, STEP_WORKLOAD)

    def tests(self) -> None:
        self.check(checks.tests())

    def sanitizer(self) -> None:
        for task in checks.sanitizers():
            self.check(task)

    def measure(self, suite: Suite, compiled: bool = False) -> None:
        """All rows, one gradient list after another: what one of them raises does not end the others."""
        contenders = [one for one in line_up(self.plan.device, compiled) if one.name not in self.without]
        settings = Settings(self.plan.device, contenders, self.plan.memory, self.plan.seed)
        for _, group in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
            part = replace(suite, cases=tuple(group))
            try:
                for row in run_suite(part, settings, lambda case: self.plan.progress(str(case))):
                    self.report.rows.append(row)
                    self.save()
            except Exception:
                self.add(Check(str(part.cases[0]), "failed", output=traceback.format_exc()))
                if self.plan.device.type == "cuda":
                    torch.cuda.synchronize()  # raises again if the device is lost to this process

    def check(self, task: Task | Check) -> Check:
        """Run it in what time is left; the device's memory is its own as far as it can be."""
        if isinstance(task, Task):
            self.plan.progress(task.name)
            gc.collect()
            torch.cuda.empty_cache()
            task = checks.run(task, self.folder, self.deadline - time.monotonic())
        self.add(task)
        return task

    def add(self, check: Check) -> None:
        self.report.gpu["checks"].append(asdict(check))
        self.save()

    def save(self) -> None:
        self.report.claims = bars.claims(self.report)
        self.report.save(self.folder / FILE)
