"""python -m benchmarks gpu: one stage after another, the JSON written after each row and each check, so that a run that
is cut short leaves what it has.
"""

from __future__ import annotations

import faulthandler
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import environment, optimizer_step
from benchmarks.contenders import OURS, line_up
from benchmarks.gpu import ceilings, checks, claims, foreach, sources
from benchmarks.gpu.checks import Check, Task
from benchmarks.measure import Settings, run_suite
from benchmarks.results import Report
from benchmarks.suites import Case, Suite, select
from benchmarks.workloads import GIB

FILE = "gpu.json"
CEILING_SECONDS, STEP_SECONDS = 4.0, 5.0
STEP_WORKLOAD = "gpt2-xl"  # six of its layers are 1.1 GB


@dataclass(frozen=True)
class Plan:
    """What to measure on and for how long; `told` hears what is being done."""

    device: torch.device
    suite: Suite
    everyone: Suite
    seed: int
    memory: int
    seconds_over: float
    """What the seconds of other measurements are divided by: 3 for a quick run."""
    told: Callable[[str], object]


@dataclass
class Run:
    """A plan on its way: the report so far, the folder that it is written to, and when time is up."""

    plan: Plan
    report: Report
    folder: Path
    deadline: float
    without: set[str] = field(default_factory=set)
    """Contenders whose kernels are not to be trusted with the process that keeps the results."""

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        self.report.claims = claims.claims(self.report)
        self.report.save(self.folder / FILE)

    def add(self, check: Check) -> None:
        self.report.gpu["checks"].append(asdict(check))
        self.save()

    def check(self, task: Task | Check) -> Check:
        """Run it in what time is left; the device's memory is its own as far as it can be."""
        if isinstance(task, Task):
            self.plan.told(task.name)
            gc.collect()
            torch.cuda.empty_cache()
            task = checks.run(task, self.folder, self.seconds_left)
        self.add(task)
        return task


def check_serves(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"this measures NVIDIA GPUs, not {device.type}; python -m benchmarks run measures others")
    if not torch.cuda.is_available():
        build = "is a build without CUDA" if torch.version.cuda is None else "finds none"
        raise ValueError(f"there is no GPU here that torch can use: torch {torch.__version__} {build}")
    torch.cuda.set_device(device)


def plan(device: torch.device, seed: int, memory: float, quick: bool, told: Callable[[str], object]) -> Plan:
    suite, everyone = (select(name, quick=quick) for name in ("gpu", "gpu-everyone"))
    return Plan(device, suite, everyone, seed, int(memory * GIB), 3.0 if quick else 1.0, told)


def new_report(plan: Plan) -> Report:
    report = Report(environment.describe(plan.device), "gpu", plan.seed)
    files = sources.hashes()
    report.gpu = {"sources": files, "sources_digest": sources.digest(files), "checks": []}
    return report


def build(run: Run) -> None:
    run.add(checks.build(run.plan.device))


def smoke(run: Run) -> None:
    """A kernel that hangs or writes where it should not must not do so in this process."""
    if run.check(checks.smoke()).bad:
        run.without.add(f"{OURS} cuda")


def ceiling(run: Run) -> None:
    seconds = CEILING_SECONDS / run.plan.seconds_over
    run.report.gpu["ceilings"] = asdict(ceilings.measure(run.plan.device, seconds, run.plan.seed))


def rows(run: Run) -> None:
    measure(run, run.plan.suite)


def everyone(run: Run) -> None:
    """torch's loop and torch.compile beside the others, on one model: both take long for their turns."""
    measure(run, run.plan.everyone, compiled=True)


def steps(run: Run) -> None:
    seconds = STEP_SECONDS / run.plan.seconds_over
    timed = optimizer_step.measure(run.plan.device, seconds, run.plan.seed, STEP_WORKLOAD)
    run.report.steps = optimizer_step.as_json(timed)


def capacity(run: Run) -> None:
    run.report.gpu["foreach_launch_capacity"] = foreach.launch_capacity(run.plan.device)


def tests(run: Run) -> None:
    run.check(checks.tests())


def sanitizer(run: Run) -> None:
    for task in checks.sanitizers():
        run.check(task)


Stage = Callable[[Run], None]
STAGES: dict[str, Stage] = {
    "build": build,
    "smoke": smoke,
    "ceilings": ceiling,
    "rows": rows,
    "steps": steps,
    "capacity": capacity,
    "tests": tests,
    "sanitizer": sanitizer,
    "everyone": everyone,
}


def measure(run: Run, suite: Suite, compiled: bool = False) -> None:
    """All rows, one gradient list after another: what one of them raises does not end the others."""
    contenders = [one for one in line_up(run.plan.device, compiled) if one.name not in run.without]
    settings = Settings(run.plan.device, contenders, run.plan.memory, run.plan.seed)
    for part in by_gradients(suite):
        try:
            for row in run_suite(part, settings, lambda case: run.plan.told(title(case))):
                run.report.rows.append(row)
                run.save()
        except Exception:
            run.add(Check(title(part.cases[0]), "failed", told=traceback.format_exc()))
            if run.plan.device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device is lost to this process


def by_gradients(suite: Suite) -> Iterator[Suite]:
    for _, cases in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
        yield replace(suite, cases=tuple(cases))


def run_all(plan: Plan, folder: Path, minutes: float, stages: Sequence[str] = tuple(STAGES)) -> Report:
    """The stages in order. What one of them raises is kept as a failed check, and the others go on.

    Once the minutes are over no stage is begun, and what hangs is ended, with its stack on stderr.
    """
    run = Run(plan, new_report(plan), folder, time.monotonic() + 60 * minutes)
    faulthandler.dump_traceback_later(60 * minutes + 30, exit=True)
    try:
        for name in stages:
            plan.told(name)
            run_stage(run, name)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return run.report


def run_stage(run: Run, name: str) -> None:
    if run.seconds_left <= 0:
        return run.add(Check(name, "left out", told="no time was left for it"))
    try:
        STAGES[name](run)
    except Exception:  # whatever it was: a GPU may be at hand for a short time, and the other stages can run
        run.add(Check(name, "failed", told=traceback.format_exc()))
    return run.save()


def failed(report: Report) -> bool:
    """Whether a check failed or one of our engines gave a wrong answer."""
    ours = [one for row in report.rows for one in row.contenders if one.contender.startswith(OURS)]
    return any(one.failure for one in ours) or any(Check(**check).bad for check in report.gpu["checks"])


def title(case: Case) -> str:
    return f"{case.workload} {case.dtype} {case.operation.value}"
