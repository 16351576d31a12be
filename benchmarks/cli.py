"""The command line: one function per command, the arguments in one place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import claims, compare, environment, table
from benchmarks.contenders import OURS, Contender, line_up
from benchmarks.measure import Settings, run_suite
from benchmarks.results import Report, Row
from benchmarks.suites import DTYPES, SUITES, Case, Suite, select
from benchmarks.train import experiments, words
from benchmarks.workloads import CATALOGUE, GIB


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
    """The main job: both training experiments, then a short table against torch."""
    report = new_report(options, "quick")
    report.training = train_all(options)
    print("\nClipping alone, against torch:\n")
    measure_all(report, options, select("quick", quick=options.quick))
    print(table.summary(report))
    print(f"\n{table.origin(report)}")
    return finish(report, options)


def run(options: argparse.Namespace) -> int:
    """Measure a suite."""
    report = new_report(options, options.suite)
    measure_all(report, options, select(options.suite, options.dtype, options.workload, options.quick))
    print(table.details(report) if options.details else table.summary(report))
    if report.claims:
        print(f"\n{table.claims(report)}")
    print(f"\n{table.origin(report)}")
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
    tuning.check_serves(device)
    if device.type == "cpu" and not options.out:
        raise ValueError("an interpreter's times must not get into the package: give --out FILE.json")
    path = options.out or tuning.PACKAGED
    known = tuning.known_rows(path, device)
    memory = int(max(options.memory, tuning.LEAST_GIB) * GIB)
    settings = Settings(device, (), memory, options.seed, options.repeats)
    results = []
    with tqdm(unit=" candidates judged", file=sys.stderr, dynamic_ncols=True) as bar:
        for dtype in options.dtype or DTYPES:
            bar.set_description(dtype)
            before = [known[dtype].tuning] if dtype in known else []
            results.append(tuning.tune(dtype, settings, options.quick, before, bar.update))
    for result in results:
        print(f"{tuning.table(result)}\n\n{tuning.verdict(result)}\n")
    tuning.write(path, device, [result for result in results if result.default_is_right])
    print(f"{table.origin(new_report(options, 'tune'))}\nsaved {path}")
    return int(not all(result.default_is_right for result in results))


def step(options: argparse.Namespace) -> int:
    """What clipping adds to a fused AdamW step, and unscaling with clipping."""
    from benchmarks import optimizer_step

    report = new_report(options, "step")
    seconds = 4.0 if options.quick else 15.0
    timed = optimizer_step.measure(torch.device(options.device), seconds, options.seed)
    report.steps = optimizer_step.as_json(timed)
    report.claims = optimizer_step.claims(timed)
    print(f"{optimizer_step.table(timed)}\n\n{table.claims(report)}\n\n{table.origin(report)}")
    return finish(report, options)


def gpu(options: argparse.Namespace) -> int:
    """Everything that has to be shown on a GPU: checks, ceilings, rows, steps; under 9 minutes on an H100."""
    from benchmarks.gpu import command, tables

    device = torch.device(options.device)
    command.check_serves(device)
    stages = [name for name in options.only or command.STAGES if name not in options.without]
    with tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, dynamic_ncols=True) as bar:
        plan = command.plan(device, options.seed, options.memory, options.quick, bar.set_description)
        report = command.run_all(plan, options.out, options.minutes, stages)
    print(f"{tables.summary(report)}\n\n{table.claims(report)}\n\n{tables.machine(report)}\n\n{table.origin(report)}")
    print(f"saved {options.out / command.FILE}")
    draw(report, options.out)
    return int(command.failed(report))


def draw(report: Report, folder: Path) -> None:
    """The pictures, if there is something to draw them with."""
    try:
        from benchmarks import plots
    except ImportError as missing:
        print(f"no pictures: {missing}; python -m benchmarks plot makes them where matplotlib is installed")
    else:
        print(*plots.draw_all(report, folder), sep="\n")


def status(options: argparse.Namespace) -> int:
    """Whether the newest GPU results were measured on the kernels as they are."""
    from benchmarks.gpu import sources

    found = sources.status(options.results)
    print(sources.tell(found))
    return int(found is None or not found.covered)


def compare_files(options: argparse.Namespace) -> int:
    """Two results row by row."""
    print(compare.compare(Report.load(options.first), Report.load(options.second)))
    return 0


def versus(options: argparse.Namespace) -> int:
    """Two installed versions of fusedclip in turns; exits with 1 if the new one is slower beyond the noise."""
    from benchmarks import versus as comparing

    suite = comparing.select(options.suite, options.workload, options.seconds, options.quick)
    settings = {name: getattr(options, name) for name in ("device", "threads", "seed")}
    settings["memory"] = int(options.memory * GIB)
    steps = options.starts * len(suite.cases)
    with tqdm(total=steps, unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
        sides, rows = comparing.compare(
            options.old, options.new, suite, settings, options.starts, lambda row: bar.update()
        )
    print(f"{comparing.table(rows)}\n\n{comparing.origin(sides)}")
    if options.out:
        comparing.save(options.out, environment.describe(torch.device(options.device)), sides, rows)
        print(f"saved {options.out}")
    return int(not all(row.holds for row in rows))


def plot(options: argparse.Namespace) -> int:
    """PNG files from a result."""
    from benchmarks import plots

    for path in plots.draw_all(Report.load(options.file), options.out or options.file.parent):
        print(path)
    return 0


def markdown(options: argparse.Namespace) -> int:
    """The README's table from a result."""
    report = Report.load(options.file)
    print(table.details(report) if options.details else table.summary(report))
    if options.claims:
        print(f"\n{table.claims(report)}")
    print(f"\n{table.origin(report)}")
    return 0


def new_report(options: argparse.Namespace, suite: str) -> Report:
    return Report(environment.describe(torch.device(options.device)), suite, options.seed)


def measure_all(report: Report, options: argparse.Namespace, suite: Suite) -> None:
    device = torch.device(options.device)
    contenders = line_up(device, options.compile)
    if options.contender:
        contenders = chosen(contenders, options.contender)
    settings = Settings(device, contenders, int(options.memory * GIB), options.seed, options.repeats)
    with tqdm(total=len(suite.cases), unit="row", file=sys.stderr, dynamic_ncols=True) as bar:

        def show(case: Case) -> None:
            bar.set_description(f"{case.workload} {case.dtype} {case.operation.value}")

        for row in run_suite(suite, settings, show):
            report.rows.append(row)
            warn(row, bar)
            bar.update()
    report.claims = claims.claims(report.rows)


def chosen(contenders: list[Contender], names: Sequence[str]) -> list[Contender]:
    by_name = {one.name: one for one in contenders}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"no contender {', '.join(unknown)} here; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def warn(row: Row, bar: Any) -> None:
    if row.restless:
        bar.write(f"{table.label(row)}: {row.restless}", sys.stderr)
    for one in row.contenders:
        if one.failure:
            bar.write(f"not timed, failed the oracle: {one.contender}, {table.label(row)}: {one.failure}", sys.stderr)


def train_all(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, experiment, tell, steps in (
        ("gpt", experiments.gpt, words.gpt, experiments.GPT_STEPS),
        ("lstm", experiments.lstm, words.lstm, experiments.LSTM_STEPS),
    ):
        steps = steps // 4 if options.quick else steps
        with tqdm(total=steps, desc=f"training {name}", unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
            found[name] = experiment(options.seed, steps, bar.update)
        print(f"\n{tell(found[name])}\n")
    if options.logdir:
        words.to_tensorboard(options.logdir, found)
    return found


def finish(report: Report, options: argparse.Namespace) -> int:
    """Save if asked; the exit status is 1 if fusedclip gave a wrong answer anywhere."""
    if options.out:
        report.save(options.out)
        print(f"saved {options.out}")
    ours = [one for row in report.rows for one in row.contenders if one.contender.startswith(OURS)]
    return int(any(one.failure for one in ours))


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
    add_run(commands.add_parser("run", parents=[measuring], help=run.__doc__))
    commands.add_parser("train", parents=[measuring], help=train.__doc__).set_defaults(command=train)
    tuning = commands.add_parser("tune", parents=[measuring], help=tune.__doc__)
    tuning.set_defaults(command=tune)
    tuning.add_argument("--dtype", action="append", choices=DTYPES, default=[], help="only this one (default: all)")
    commands.add_parser("step", parents=[measuring], help=step.__doc__).set_defaults(command=step)
    add_versus(commands.add_parser("versus", parents=[measuring], help=versus.__doc__))
    add_gpu(commands)
    add_readers(commands)
    return top


def add_measuring(to: argparse.ArgumentParser) -> None:
    to.add_argument("--device", default="cpu", help="cpu or cuda")
    to.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    to.add_argument("--seed", type=int, default=0)
    to.add_argument("--out", type=Path, metavar="FILE.json", help="keep the result")
    to.add_argument("--quick", action="store_true", help="fewer steps, a third of the time per row")
    to.add_argument("--repeats", type=int, default=2000, help="rounds per row at most")
    to.add_argument("--memory", type=float, default=1.0, help="GiB of gradients; larger models are cut to it")
    to.add_argument("--compile", action="store_true", help="torch.compile takes part (compiles for about 30 s)")
    to.add_argument("--contender", action="append", help="only these, by name")
    to.add_argument("--logdir", type=Path, help="write the training curves for TensorBoard")


def add_run(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run)
    command.add_argument("--suite", choices=SUITES, default="default")
    command.add_argument("--dtype", action="append", choices=DTYPES, default=[], help="instead of the suite's own")
    command.add_argument("--workload", action="append", choices=CATALOGUE, default=[], help="only these of the suite")
    command.add_argument("--details", action="store_true", help="every contender, not only torch foreach and fusedclip")


def add_versus(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=versus)
    command.add_argument("old", type=Path, metavar="PYTHON_OLD", help="the interpreter of an environment")
    command.add_argument("new", type=Path, metavar="PYTHON_NEW", help="that of another")
    command.add_argument("--suite", choices=[*SUITES, "odd"], default="claims")
    command.add_argument("--workload", action="append", default=[], help="only these of the suite")
    command.add_argument("--seconds", type=float, help="per row, all processes together (default: by the suite)")
    command.add_argument("--starts", type=int, default=3, help="the seconds are shared by so many fresh processes")


def add_gpu(commands: Any) -> None:
    from benchmarks.gpu import command, sources

    whole = commands.add_parser("gpu", help=gpu.__doc__)
    whole.set_defaults(command=gpu)
    whole.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="for the JSON and the pictures")
    whole.add_argument("--device", default="cuda", help="cuda, or cuda:N")
    whole.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    whole.add_argument("--quick", action="store_true", default=argparse.SUPPRESS, help="a third of the time per row")
    whole.add_argument("--memory", type=float, default=2.0, help="GiB of gradients; takes about five times as much")
    whole.add_argument("--minutes", type=float, default=9.0, help="begin nothing after them, and end what hangs")
    whole.add_argument("--only", action="append", choices=command.STAGES, default=[], help="this stage")
    whole.add_argument("--without", action="append", choices=command.STAGES, default=[], help="leave out this stage")
    covering = commands.add_parser("status", help=status.__doc__)
    covering.set_defaults(command=status)
    covering.add_argument("--results", type=Path, default=sources.RESULTS, help="look for results below this folder")


def add_readers(commands: Any) -> None:
    comparing = commands.add_parser("compare", help=compare_files.__doc__)
    comparing.set_defaults(command=compare_files)
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    plotting = commands.add_parser("plot", help=plot.__doc__)
    plotting.set_defaults(command=plot)
    plotting.add_argument("file", type=Path)
    plotting.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the file")
    tabulating = commands.add_parser("table", help=markdown.__doc__)
    tabulating.set_defaults(command=markdown)
    tabulating.add_argument("file", type=Path)
    tabulating.add_argument("--details", action="store_true")
    tabulating.add_argument("--claims", action="store_true")
