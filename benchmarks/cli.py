"""The command line: one function per command, the arguments in one place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import compare, environment, optimizer_step, table
from benchmarks import versus as versions
from benchmarks.contenders import Contender, line_up
from benchmarks.gpu import STAGES
from benchmarks.measure import Settings, run_suite
from benchmarks.release import bars, sources
from benchmarks.results import Report, Row
from benchmarks.suites import DTYPES, SUITES, Suite, select
from benchmarks.train import experiments
from benchmarks.workloads import CATALOGUE, GIB

RESULT = Path("benchmark-results") / "main.json"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except (ValueError, KeyError, FileNotFoundError) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2


def everything(options: argparse.Namespace) -> int:
    """The main job: both training experiments, then a short table against torch, and pictures of both."""
    options.out = options.out or RESULT
    report = new_report(options, "quick")
    report.training = train_all(options)
    print("\nClipping alone, against torch:\n")
    measure_all(report, options, select("quick", quick=options.quick))
    print(table.summary(report))
    draw(report, options.out.parent)
    return finish(report, options)


def run(options: argparse.Namespace) -> int:
    """Measure a suite."""
    report = new_report(options, options.suite)
    measure_all(report, options, select(options.suite, options.dtype, options.workload, options.quick))
    print(table.details(report) if options.details else table.summary(report))
    print_claims(report)
    return finish(report, options)


def train(options: argparse.Namespace) -> int:
    """The training experiments only."""
    report = new_report(options, "train")
    report.training = train_all(options)
    return finish(report, options)


def tune(options: argparse.Namespace) -> int:
    """Measure the Triton engine's tuning table."""
    from benchmarks import tune as tuning

    device = torch.device(options.device)
    path = tuning.file_for(device, options.out)
    settings = Settings(device, (), int(max(options.memory, tuning.LEAST_GIB) * GIB), options.seed, options.repeats)
    with progress_bar(unit=" candidates judged") as bar:
        results = tuning.tune_all(options.dtype or DTYPES, settings, options.quick, path, bar)
    for result in results:
        print(f"{tuning.table(result)}\n\n{tuning.verdict(result)}\n")
    print(f"{table.origin(new_report(options, 'tune'))}\nsaved {path}")
    return int(not all(result.default_is_right for result in results))


def step(options: argparse.Namespace) -> int:
    """What clipping adds to a fused AdamW step, and unscaling with clipping."""
    report = new_report(options, "step")
    report.rows += optimizer_step.measure(settings_of(options), 4.0 if options.quick else 15.0)
    report.claims = bars.claims(report)
    print(table.summary(report))
    print_claims(report)
    return finish(report, options)


def gpu(options: argparse.Namespace) -> int:
    """Everything that has to be shown on a GPU: checks, ceilings, rows, steps; under 9 minutes on an H100."""
    from benchmarks.gpu import command
    from benchmarks.gpu import table as gpu_table

    device = torch.device(options.device)
    command.check_serves(device)
    stages = [name for name in options.only or STAGES if name not in options.without]
    with tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, dynamic_ncols=True) as bar:
        plan = command.plan(device, options.seed, options.memory, options.quick, bar.set_description)
        report = command.run_all(plan, options.out, options.minutes, stages)
    print(f"{gpu_table.summary(report)}\n\n{table.claims(report)}\n\n{gpu_table.machine(report)}")
    print(f"\n{table.origin(report)}\nsaved {options.out / command.FILE}")
    draw(report, options.out)
    return int(command.failed(report))


def distributed(options: argparse.Namespace) -> int:
    """Clipping FSDP2's gradients on several processes: torch's DTensors, torch on local tensors, and ours."""
    from benchmarks.distributed import command

    return command.compare(options.nproc, 1.5 if options.quick else 5.0, options.seed, options.out)


def status(options: argparse.Namespace) -> int:
    """Whether the newest GPU results were measured on the kernels as they are."""
    found = sources.status(options.results)
    print(sources.summary(found))
    return int(found is None or not found.covered)


def compare_files(options: argparse.Namespace) -> int:
    """Two results row by row."""
    print(compare.compare(Report.load(options.first), Report.load(options.second)))
    return 0


def versus(options: argparse.Namespace) -> int:
    """Two installed versions of fusedclip in turns; exits with 1 if the new one is slower beyond the noise."""
    suite = versions.select(options.suite, options.workload, options.seconds, options.quick)
    settings = {name: getattr(options, name) for name in ("device", "threads", "seed")}
    settings["memory"] = int(options.memory * GIB)
    with progress_bar(unit="row", total=options.starts * len(suite.cases)) as bar:
        sides, rows = versions.compare(options.old, options.new, suite, settings, options.starts, bar.update)
    print(f"{versions.table(rows)}\n\n{versions.origin(sides)}")
    report = new_report(options, options.suite)
    report.versus = versions.as_json(sides, rows)
    finish(report, options, origin=False)
    return int(not all(row.holds for row in rows))


def plot(options: argparse.Namespace) -> int:
    """PNG files from a result."""
    draw(Report.load(options.file), options.out or options.file.parent)
    return 0


def markdown(options: argparse.Namespace) -> int:
    """The README's table from a result."""
    report = Report.load(options.file)
    print(table.details(report) if options.details else table.summary(report))
    if options.claims:
        print_claims(report)
    print(f"\n{table.origin(report)}")
    return 0


def new_report(options: argparse.Namespace, suite: str) -> Report:
    return Report(environment.describe(torch.device(options.device)), suite, options.seed)


def settings_of(options: argparse.Namespace, contenders: Sequence[Contender] = ()) -> Settings:
    device = torch.device(options.device)
    return Settings(device, contenders, int(options.memory * GIB), options.seed, options.repeats)


def progress_bar(**options: Any) -> Any:
    return tqdm(file=sys.stderr, dynamic_ncols=True, **options)


def measure_all(report: Report, options: argparse.Namespace, suite: Suite) -> None:
    contenders = line_up(torch.device(options.device), options.compile)
    if options.contender:
        contenders = chosen(contenders, options.contender)
    with progress_bar(unit="row", total=len(suite.cases)) as bar:
        for row in run_suite(suite, settings_of(options, contenders), lambda case: bar.set_description(str(case))):
            report.rows.append(row)
            warn(row, bar)
            bar.update()
    report.claims = bars.claims(report)


def chosen(contenders: list[Contender], names: Sequence[str]) -> list[Contender]:
    by_name = {one.name: one for one in contenders}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"no contender {', '.join(unknown)} here; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def warn(row: Row, bar: Any) -> None:
    if row.disturbance:
        bar.write(f"{table.label(row)}: {row.disturbance}", sys.stderr)
    for one in row.contenders:
        if one.failure:
            bar.write(f"not timed, failed the oracle: {one.contender}, {table.label(row)}: {one.failure}", sys.stderr)


def train_all(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, experiment in experiments.EXPERIMENTS.items():
        steps = experiment.steps // 4 if options.quick else experiment.steps
        with progress_bar(unit="step", total=steps, desc=f"training {name}") as bar:
            found[name] = experiment.run(options.seed, steps, bar.update)
        print(f"\n{experiment.summary(found[name])}\n")
    if options.logdir:
        experiments.to_tensorboard(options.logdir, found)
    return found


def print_claims(report: Report) -> None:
    if report.claims:
        print(f"\n{table.claims(report)}")


def finish(report: Report, options: argparse.Namespace, origin: bool = True) -> int:
    """Where it was measured; save if asked; the exit status is 1 if fusedclip gave a wrong answer anywhere."""
    if origin:
        print(f"\n{table.origin(report)}")
    if options.out:
        report.save(options.out)
        print(f"saved {options.out}")
    return int(report.wrong)


def draw(report: Report, folder: Path) -> None:
    """The pictures, if there is something to draw them with."""
    try:
        from benchmarks import plots
    except ImportError as missing:
        print(f"no pictures: {missing}; python -m benchmarks plot makes them where matplotlib is installed")
    else:
        print(*(f"drew {path}" for path in plots.draw_all(report, folder)), sep="\n")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add_measuring(top)
    top.set_defaults(command=everything)
    commands = top.add_subparsers(title="commands", description="without one: train, then a short table")
    # A command's own defaults would overwrite what stands before the command: it has none.
    measuring = argparse.ArgumentParser(add_help=False)
    add_measuring(measuring)
    for action in measuring._actions:
        action.default = argparse.SUPPRESS

    def new(command: Callable[..., int], name: str = "", measures: bool = False) -> Callable[..., argparse.Action]:
        parents = [measuring] if measures else []
        made = commands.add_parser(name or command.__name__, parents=parents, help=command.__doc__)
        made.set_defaults(command=command)
        return made.add_argument

    add = new(run, measures=True)
    add("--suite", choices=SUITES, default="default")
    add("--dtype", action="append", choices=DTYPES, default=[], help="instead of the suite's own")
    add("--workload", action="append", choices=CATALOGUE, default=[], help="only these of the suite")
    add("--details", action="store_true", help="every contender, not only torch foreach and fusedclip")
    new(train, measures=True)
    add = new(tune, measures=True)
    add("--dtype", action="append", choices=DTYPES, default=[], help="only this one (default: all)")
    new(step, measures=True)
    add = new(versus, measures=True)
    add("old", type=Path, metavar="PYTHON_OLD", help="the interpreter of an environment")
    add("new", type=Path, metavar="PYTHON_NEW", help="that of another")
    add("--suite", choices=versions.ALL_SUITES, default="claims")
    add("--workload", action="append", default=[], help="only these of the suite")
    add("--seconds", type=float, help="per row, all processes together (default: by the suite)")
    add("--starts", type=int, default=3, help="the seconds are shared by so many fresh processes")
    add = new(distributed, measures=True)
    add("--nproc", type=int, default=4, help="processes at most; 8 for the whole weak-scaling table")
    add = new(gpu)
    add("--out", type=Path, metavar="FOLDER", required=True, help="for the JSON and the pictures")
    add("--device", default="cuda", help="cuda, or cuda:N")
    add("--seed", type=int, default=argparse.SUPPRESS)
    add("--quick", action="store_true", default=argparse.SUPPRESS, help="a third of the time per row")
    add("--memory", type=float, default=2.0, help="GiB of gradients; takes about five times as much")
    add("--minutes", type=float, default=9.0, help="begin nothing after them, and end what hangs")
    add("--only", action="append", choices=STAGES, default=[], help="this stage")
    add("--without", action="append", choices=STAGES, default=[], help="leave out this stage")
    add = new(status)
    add("--results", type=Path, default=sources.RESULTS, help="look for results below this folder")
    add = new(compare_files, "compare")
    add("first", type=Path)
    add("second", type=Path)
    add = new(plot)
    add("file", type=Path)
    add("--out", type=Path, metavar="FOLDER", help="default: beside the file")
    add = new(markdown, "table")
    add("file", type=Path)
    add("--details", action="store_true")
    add("--claims", action="store_true")
    return top


def add_measuring(to: argparse.ArgumentParser) -> None:
    to.add_argument("--device", default="cpu", help="cpu or cuda")
    to.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    to.add_argument("--seed", type=int, default=0)
    to.add_argument("--out", type=Path, metavar="FILE.json", help=f"keep the result (without a command: {RESULT})")
    to.add_argument("--quick", action="store_true", help="fewer steps, a third of the time per row")
    to.add_argument("--repeats", type=int, default=2000, help="rounds per row at most")
    to.add_argument("--memory", type=float, default=1.0, help="GiB of gradients; larger models are cut to it")
    to.add_argument("--compile", action="store_true", help="torch.compile takes part (compiles for about 30 s)")
    to.add_argument("--contender", action="append", help="only these, by name")
    to.add_argument("--logdir", type=Path, help="write the training curves for TensorBoard")
