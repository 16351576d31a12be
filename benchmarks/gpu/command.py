"""python -m benchmarks gpu: one stage after another, the JSON written after each, so that a run that is cut short
leaves what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import environment, optimizer_step
from benchmarks.contenders import OURS, line_up
from benchmarks.gpu import ceilings, checks, claims, foreach, sources
from benchmarks.gpu.checks import Check
from benchmarks.measure import Settings, run_suite
from benchmarks.results import Report
from benchmarks.suites import Case, Suite, select
from benchmarks.workloads import GIB

SUITE = "gpu"
FILE = "gpu.json"
CEILING_SECONDS, STEP_SECONDS = 4.0, 5.0
STEP_WORKLOAD = "gpt2-xl"  # six of its layers are 1.1 GB


@dataclass(frozen=True)
class Plan:
    """What to measure on and for how long; `told` hears what is being done."""

    device: torch.device
    suite: Suite
    compiled: Suite
    seed: int
    memory: int
    shorter: float
    told: Callable[[str], object]

    def settings(self, compiled: bool = False) -> Settings:
        contenders = [one for one in line_up(self.device, compiled) if not compiled or one.name != "torch loop"]
        return Settings(self.device, contenders, self.memory, self.seed)


def check_serves(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"this measures NVIDIA GPUs, not {device.type}; python -m benchmarks run measures others")
    if not torch.cuda.is_available():
        build = "is a build without CUDA" if torch.version.cuda is None else "finds none"
        raise ValueError(f"there is no GPU here that torch can use: torch {torch.__version__} {build}")


def plan(device: torch.device, seed: int, memory: float, quick: bool, told: Callable[[str], object]) -> Plan:
    suite, compiled = select(SUITE, quick=quick), select("gpu-compile", quick=quick)
    return Plan(device, suite, compiled, seed, int(memory * GIB), 3.0 if quick else 1.0, told)


def new_report(plan: Plan) -> Report:
    report = Report(environment.describe(plan.device), SUITE, plan.seed)
    files = sources.hashes()
    report.gpu = {"sources": files, "sources_digest": sources.digest(files), "checks": []}
    return report


def build(plan: Plan, report: Report) -> None:
    add(report, checks.build(plan.device))


def ceiling(plan: Plan, report: Report) -> None:
    report.gpu["ceilings"] = asdict(ceilings.measure(plan.device, CEILING_SECONDS / plan.shorter, plan.seed))
    report.gpu["foreach_launch_capacity"] = foreach.launch_capacity(plan.device)


def rows(plan: Plan, report: Report) -> None:
    report.rows += run_suite(plan.suite, plan.settings(), lambda case: plan.told(title(case)))


def compiled(plan: Plan, report: Report) -> None:
    """torch.compile beside torch foreach and ours; rows of their own, kept apart from the suite's."""
    found = run_suite(plan.compiled, plan.settings(compiled=True), lambda case: plan.told(f"{title(case)}, compiled"))
    report.gpu["compiled"] = [asdict(row) for row in found]


def steps(plan: Plan, report: Report) -> None:
    seconds = STEP_SECONDS / plan.shorter
    timed = optimizer_step.measure(plan.device, seconds, plan.seed, STEP_WORKLOAD)
    report.steps = optimizer_step.as_json(timed)


def tests(plan: Plan, report: Report) -> None:
    add(report, checks.tests())


def sanitizer(plan: Plan, report: Report) -> None:
    for check in checks.sanitizers():
        add(report, check)


Stage = Callable[[Plan, Report], None]
STAGES: dict[str, Stage] = {
    "build": build,
    "ceilings": ceiling,
    "rows": rows,
    "steps": steps,
    "tests": tests,
    "sanitizer": sanitizer,
    "compile": compiled,
}


def add(report: Report, check: Check) -> None:
    report.gpu["checks"].append(asdict(check))


def run(plan: Plan, folder: Path, without: Sequence[str] = ()) -> Report:
    """All stages but those in `without`. What a stage raises is kept as a failed check, and the others go on."""
    report = new_report(plan)
    for name, stage in STAGES.items():
        if name in without:
            continue
        plan.told(name)
        try:
            stage(plan, report)
        except Exception as problem:  # whatever it was: the lease of a GPU is short, and the other stages can run
            add(report, Check(name, "failed", told=f"{type(problem).__name__}: {problem}"))
        report.claims = claims.claims(report)
        report.save(folder / FILE)
    return report


def failed(report: Report) -> bool:
    """Whether a check failed or one of our engines gave a wrong answer."""
    ours = [one for row in report.rows for one in row.contenders if one.contender.startswith(OURS)]
    return any(one.failure for one in ours) or any(Check(**check).bad for check in report.gpu["checks"])


def title(case: Case) -> str:
    return f"{case.workload} {case.dtype} {case.operation.value}"
