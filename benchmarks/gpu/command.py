"""python -m benchmarks gpu: one stage after another, the JSON written after each row and each check, so that a run that
is cut short leaves what it has.
"""

import faulthandler
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import environment, optimizer_step, table
from benchmarks.contenders import OURS, TORCH_FOREACH, line_up
from benchmarks.gpu import ceilings
from benchmarks.measure import Settings, run_suite
from benchmarks.release import bars, checks, sources
from benchmarks.release.checks import Check, Task
from benchmarks.results import Report, Row
from benchmarks.suites import select
from benchmarks.table import label, markdown, short, time_of
from benchmarks.workloads import GIB

Progress = Callable[[str], object]
FILE = "gpu.json"
STAGES = ("build", "smoke", "ceilings", "rows", "steps", "tests", "sanitizer", "everyone")
CEILING_SECONDS, STEP_SECONDS = 4.0, 5.0
STEP_WORKLOAD = "gpt2-xl"  # six of its layers are 1.1 GB


def served(device: torch.device) -> torch.device:
    """This GPU, with its number, as the current device."""
    if device.type != "cuda":
        raise ValueError(f"this measures NVIDIA GPUs, not {device.type}; python -m benchmarks run measures others")
    environment.require(device)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def failed(report: Report) -> bool:
    """Whether a check failed or one of our engines gave a wrong answer."""
    return report.wrong or any(Check(**check).bad for check in report.gpu["checks"])


class Run:
    """A run on its way: the report so far, the folder that it is written to, and when time is up.

    The stages are the methods of their names; `progress` hears what is being done.
    """

    def __init__(self, settings: Settings, quick: bool, folder: Path, minutes: float, progress: Progress) -> None:
        self.settings, self.quick, self.folder, self.progress = settings, quick, folder, progress
        self.deadline = time.monotonic() + 60 * minutes
        self.share = 1 / 3 if quick else 1.0  # of the seconds of a row
        self.without = set[str]()  # contenders whose kernels are not to be trusted with the process of the results
        self.report = Report(environment.describe(settings.device), "gpu", settings.seed)
        self.report.gpu = {"sources": sources.hashes(), "checks": []}

    def all(self, stages: Sequence[str]) -> Report:
        """The stages in order. What one of them raises is kept as a failed check, and the others go on.

        Once the minutes are over no stage is begun, and what hangs is ended, with its stack on stderr.
        """
        faulthandler.dump_traceback_later(self.deadline + 30 - time.monotonic(), exit=True)
        try:
            for name in stages:
                self.progress(name)
                if self.deadline <= time.monotonic():
                    self.add(Check(name, "left out", output="no time was left for it"))
                    continue
                with self.going_on(name):
                    getattr(self, name)()
        finally:
            faulthandler.cancel_dump_traceback_later()
        return self.report

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """Whatever is raised is kept as a failed check: a GPU may be at hand for a short time, and the rest can run."""
        try:
            yield
        except Exception:
            self.add(Check(name, "failed", output=traceback.format_exc()))
        self.save()

    def build(self) -> None:
        self.add(checks.build(self.settings.device))

    def smoke(self) -> None:
        """A kernel that hangs or writes where it should not must not do so in this process."""
        if self.check(checks.smoke()).bad:
            self.without.add(f"{OURS} cuda")

    def ceilings(self) -> None:
        how = self.settings.device, self.share * CEILING_SECONDS, self.settings.seed
        self.report.gpu["ceilings"] = ceilings.measure(*how)

    def rows(self) -> None:
        self.measure("gpu")

    def everyone(self) -> None:
        """torch's loop and torch.compile beside the others, on one model: both take long for their turns."""
        self.measure("gpu-everyone", compiled=True)

    def steps(self) -> None:
        settings = replace(self.settings, memory=GIB)
        self.report.rows += optimizer_step.measure(settings, self.share * STEP_SECONDS, STEP_WORKLOAD)

    def tests(self) -> None:
        self.check(checks.tests())

    def sanitizer(self) -> None:
        for task in checks.sanitizers():
            self.check(task)

    def measure(self, name: str, compiled: bool = False) -> None:
        """A suite's rows, one gradient list after another: what one of them raises does not end the others."""
        device, suite = self.settings.device, select(name, quick=self.quick)
        contenders = [one for one in line_up(device, compiled) if one.name not in self.without]
        settings = replace(self.settings, contenders=contenders)
        for _, group in groupby(suite.cases, lambda case: (case.workload, case.dtype)):
            part = replace(suite, cases=tuple(group))
            with self.going_on(str(part.cases[0])):
                for row in run_suite(part, settings, lambda case: self.progress(str(case))):
                    self.report.rows.append(row)
                    self.save()
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device is lost to this process

    def check(self, task: Task | Check) -> Check:
        """Run it in what time is left; the device's memory is its own as far as it can be."""
        if isinstance(task, Task):
            self.progress(task.name)
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


def summary(report: Report) -> str:
    """One line per row: the device's own times, then wall times, torch's foreach path beside the engines."""
    header = ["gradients", "torch foreach", "cuda", "triton", "ratio", "of read floor"]
    header += ["wall: torch", "cuda", "ratio", "host: torch", "cuda"]
    return table.summary(report, lambda rows: markdown(header, list(map(_line, rows))))


def _line(row: Row) -> list[str]:
    torchs, cuda, triton = map(row.find, (TORCH_FOREACH, bars.CUDA, bars.TRITON))
    return [
        label(row),
        *(time_of(one, one.device_us) for one in (torchs, cuda, triton)),
        short(torchs.device_us / cuda.device_us, ".2f", "x"),
        short(cuda.floor_fraction, ".0%"),
        *(time_of(one, one.p50_us) for one in (torchs, cuda)),
        short(torchs.p50_us / cuda.p50_us, ".2f", "x"),
        *(time_of(one, one.host_us) for one in (torchs, cuda)),
    ]


def machine(report: Report) -> str:
    """Ceilings and checks, a line each."""
    found, lines = report.gpu, []
    if ceilings := found.get("ceilings"):
        read = f"read {ceilings['read']:,.0f} GB/s ({ceilings['read_by']})"
        lines.append(f"ceilings: {read}, copy {ceilings['copy']:,.0f} GB/s ({ceilings['copy_by']})")
    for check in found.get("checks", []):
        last = check["output"].splitlines()[-1:] if check["outcome"] != "passed" or check["name"] == "tests" else []
        lines.append(" ".join([f"{check['name']}: {check['outcome']} ({check['seconds']:.0f} s)", *last]))
    lines += [f"promised, and not measured: {name}" for name in bars.missing(report)]
    return "\n".join(lines)
