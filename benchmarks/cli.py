"""The command line: one function per command, the options of each in one table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import documents, environment, optimizer_step, table
from benchmarks import versus as versions
from benchmarks.compare import compare
from benchmarks.contenders import Contender, line_up
from benchmarks.gpu import STAGES
from benchmarks.measure import Settings, run_suite
from benchmarks.release import bars, sources
from benchmarks.results import Report, Row
from benchmarks.suites import DTYPES, SUITES, Suite, select
from benchmarks.train import experiments
from benchmarks.workloads import CATALOGUE, GIB

RESULT = Path("benchmark-results") / "main.json"
Options = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if threads := getattr(options, "threads", None):
        torch.set_num_threads(threads)
    try:
        command: Callable[[Options], int] = options.command
        return command(options)
    except (ValueError, KeyError, FileNotFoundError) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2


def everything(options: Options) -> int:
    """The main job: both training experiments, then a short table against torch, and pictures of both."""
    options.out = options.out or RESULT
    report = new_report(options, "quick")
    train_all(report, options)
    print("\nClipping alone, against torch:\n")
    measure_all(report, options, select("quick", quick=options.quick))
    print(table.summary(report))
    draw(report, options.out.parent)
    return finish(report, options)


def run(options: Options) -> int:
    """Measure a suite."""
    report = new_report(options, options.suite)
    measure_all(report, options, select(options.suite, options.dtype, options.workload, options.quick))
    return finish(report, options, tables=True)


def train(options: Options) -> int:
    """The training experiments only, or how adaptive rules take a spike."""
    report = new_report(options, "train")
    if options.adaptive:
        options.out = options.out or RESULT.with_name("adaptive.json")
        train_one("adaptive", experiments.ADAPTIVE_STEPS, report, options)
        draw(report, options.out.parent)
    else:
        train_all(report, options)
    return finish(report, options)


def tune(options: Options) -> int:
    """Measure the Triton engine's tuning table."""
    from benchmarks import tune as tuning

    path = tuning.file_for(torch.device(options.device), options.out)
    options.memory = max(options.memory, tuning.LEAST_GIB)
    with progress_bar(unit=" candidates judged") as bar:
        results = tuning.tune_all(options.dtype or DTYPES, settings_of(options), options.quick, path, bar)
    for result in results:
        print(f"{tuning.table(result)}\n\n{tuning.verdict(result)}\n")
    print(f"{table.origin(new_report(options, 'tune'))}\nsaved {path}")
    return int(not all(result.default_is_right for result in results))


def step(options: Options) -> int:
    """What clipping adds to a fused AdamW step, and unscaling with clipping."""
    report = new_report(options, "step")
    report.rows += optimizer_step.measure(settings_of(options), 4.0 if options.quick else 15.0)
    report.claims = bars.claims(report)
    return finish(report, options, tables=True)


def results(options: Options) -> int:
    """All that the documents show: the claims, the step and the training, measured again, and the documents renewed."""
    folder, wrong = options.out or documents.RESULTS, 0
    options.suite, options.dtype, options.workload, options.details = "claims", [], [], False
    for name, command in {"claims": run, "step": step, "training": train, "adaptive": train}.items():
        options.adaptive = name == "adaptive"
        options.out = folder / f"{name}.json"
        if not options.no_measuring:
            wrong += command(options)
        draw(Report.load(options.out), folder)
    documents.renew(folder)
    return wrong


def gpu(options: Options) -> int:
    """Everything that has to be shown on a GPU: checks, ceilings, rows, steps; under 9 minutes on an H100."""
    from benchmarks.gpu import command
    from benchmarks.gpu import table as gpu_table

    device = command.served(torch.device(options.device))
    stages = [name for name in options.only or STAGES if name not in options.without]
    with progress_bar(bar_format="{desc} [{elapsed}]") as bar:
        plan = command.plan(device, options.seed, options.memory, options.quick, bar.set_description)
        report = command.run_all(plan, options.out, options.minutes, stages)
    print(f"{gpu_table.summary(report)}\n\n{table.claims(report)}\n\n{gpu_table.machine(report)}")
    print(f"\n{table.origin(report)}\nsaved {options.out / command.FILE}")
    draw(report, options.out)
    return int(command.failed(report))


def distributed(options: Options) -> int:
    """Clipping FSDP2's gradients on several processes: torch's DTensors, torch on local tensors, and ours."""
    from benchmarks.distributed import command

    return command.compare(options.nproc, 1.5 if options.quick else 5.0, options.seed, options.out)


def status(options: Options) -> int:
    """Whether the newest GPU results were measured on the kernels as they are."""
    found = sources.status(options.results)
    print(sources.summary(found))
    return int(found is None or not found.covered)


def compare_files(options: Options) -> int:
    """Two results row by row."""
    print(compare(Report.load(options.first), Report.load(options.second)))
    return 0


def versus(options: Options) -> int:
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


def plot(options: Options) -> int:
    """PNG files from a result."""
    draw(Report.load(options.file), options.out or options.file.parent)
    return 0


def show(options: Options) -> int:
    """The tables of a result."""
    report = Report.load(options.file)
    print_tables(report, options.details, options.claims)
    print(f"\n{table.origin(report)}")
    return 0


def new_report(options: Options, suite: str) -> Report:
    return Report(environment.describe(torch.device(options.device)), suite, options.seed)


def settings_of(options: Options, contenders: Sequence[Contender] = ()) -> Settings:
    return Settings(torch.device(options.device), contenders, int(options.memory * GIB), options.seed, options.repeats)


def progress_bar(**options: Any) -> Any:
    return tqdm(file=sys.stderr, dynamic_ncols=True, **options)


def measure_all(report: Report, options: Options, suite: Suite) -> None:
    contenders = line_up(torch.device(options.device), options.compile)
    by_name = {one.name: one for one in contenders}
    if unknown := [name for name in options.contender if name not in by_name]:
        raise ValueError(f"no contender {', '.join(unknown)} here; there are {', '.join(by_name)}")
    contenders = [by_name[name] for name in options.contender] or contenders
    with progress_bar(unit="row", total=len(suite.cases)) as bar:
        for row in run_suite(suite, settings_of(options, contenders), lambda case: bar.set_description(str(case))):
            report.rows.append(row)
            for warning in warnings(row):
                bar.write(f"{table.label(row)}: {warning}", sys.stderr)
            bar.update()
    report.claims = bars.claims(report)


def warnings(row: Row) -> list[str]:
    wrong = [one for one in row.contenders if one.failure]
    failed = [f"not timed, failed the oracle: {one.contender}: {one.failure}" for one in wrong]
    return [*filter(None, [row.disturbance]), *failed]


def train_all(report: Report, options: Options) -> None:
    for name, steps in experiments.STEPS.items():
        train_one(name, steps, report, options)


def train_one(name: str, steps: int, report: Report, options: Options) -> None:
    steps = steps // 4 if options.quick else steps
    with progress_bar(unit="step", total=steps, desc=f"training {name}") as bar:
        report.training[name] = experiments.run(name, options.seed, steps, bar.update)
    print(f"\n{name.upper()}:\n\n{experiments.summary(report.training[name])}\n")
    if options.logdir:
        experiments.to_tensorboard(options.logdir, report.training)


def print_tables(report: Report, details: bool, claims: bool = True) -> None:
    print(table.details(report) if details else table.summary(report))
    if claims and report.claims:
        print(f"\n{table.claims(report)}")


def finish(report: Report, options: Options, tables: bool = False, origin: bool = True) -> int:
    """What was measured and where; save if asked; the exit status is 1 if fusedclip gave a wrong answer anywhere."""
    if tables:
        print_tables(report, getattr(options, "details", False))
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


def option(help: str = "", **how: Any) -> dict[str, Any]:
    return {"help": help or None, **how}


FLAG: dict[str, Any] = {"action": "store_true"}
EACH: dict[str, Any] = {"action": "append", "default": []}
FOLDER, FILE = {"type": Path, "metavar": "FOLDER"}, {"type": Path, "metavar": "FILE.json"}
QUICK = option("fewer steps, a third of the time per row", **FLAG)
SEED = option(type=int, default=0)
DETAILS = option("every contender, not only torch foreach and fusedclip", **FLAG)
DTYPE = option("only this one (default: the suite's own, tuning: all)", choices=DTYPES, **EACH)
MEASURING = {
    "--device": option("cpu or cuda", default="cpu"),
    "--threads": option("CPU threads (default: torch's)", type=int),
    "--seed": SEED,
    "--out": option(f"keep the result (without a command: {RESULT})", **FILE),
    "--quick": QUICK,
    "--repeats": option("rounds per row at most", type=int, default=2000),
    "--memory": option("GiB of gradients; larger models are cut to it", type=float, default=1.0),
    "--compile": option("torch.compile takes part (compiles for about 30 s)", **FLAG),
    "--contender": option("only these, by name", **EACH),
    "--logdir": option("write the training curves for TensorBoard", **FOLDER),
}
# The options of its own that each command has; those of the first group have the measuring ones as well.
MEASURE: dict[str, tuple[Callable[[Options], int], dict[str, Any]]] = {
    "run": (run, {
        "--suite": option(choices=SUITES, default="default"),
        "--dtype": DTYPE,
        "--workload": option("only these of the suite", choices=CATALOGUE, **EACH),
        "--details": DETAILS,
    }),
    "train": (train, {"--adaptive": option("AutoClip, ZClip, AdaGC and SkipSpikes beside a fixed limit", **FLAG)}),
    "tune": (tune, {"--dtype": DTYPE}),
    "step": (step, {}),
    "results": (results, {"--no-measuring": option("renew pictures and documents from what is there", **FLAG)}),
    "versus": (versus, {
        "old": option("the interpreter of an environment", type=Path, metavar="PYTHON_OLD"),
        "new": option("that of another", type=Path, metavar="PYTHON_NEW"),
        "--suite": option(choices=versions.ALL_SUITES, default="claims"),
        "--workload": option("only these of the suite", **EACH),
        "--seconds": option("per row, all processes together (default: by the suite)", type=float),
        "--starts": option("the seconds are shared by so many fresh processes", type=int, default=3),
    }),
}  # fmt: skip
OTHERS: dict[str, tuple[Callable[[Options], int], dict[str, Any]]] = {
    "gpu": (gpu, {
        "--out": option("for the JSON and the pictures", required=True, **FOLDER),
        "--device": option("cuda, or cuda:N", default="cuda"),
        "--seed": SEED,
        "--quick": QUICK,
        "--memory": option("GiB of gradients; takes about five times as much", type=float, default=2.0),
        "--minutes": option("begin nothing after them, and end what hangs", type=float, default=9.0),
        "--only": option("this stage", choices=STAGES, **EACH),
        "--without": option("leave out this stage", choices=STAGES, **EACH),
    }),
    "distributed": (distributed, {
        "--nproc": option("processes at most; 8 for the whole weak-scaling table", type=int, default=4),
        "--seed": SEED,
        "--quick": QUICK,
        "--out": option("keep the result", **FILE),
    }),
    "status": (status, {"--results": option("look for results below it", default=sources.RESULTS, **FOLDER)}),
    "compare": (compare_files, {"first": FILE, "second": FILE}),
    "plot": (plot, {"file": FILE, "--out": option("default: beside the file", **FOLDER)}),
    "table": (show, {"file": FILE, "--details": DETAILS, "--claims": option("and the project's bars", **FLAG)}),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(title="commands", description="without one: train, then a short table")
    top.set_defaults(command=everything)
    for name, how in MEASURING.items():
        top.add_argument(name, **how)
    # A command's own defaults would overwrite what stands before the command: these have none.
    inherited = {name: {**how, "default": argparse.SUPPRESS} for name, how in MEASURING.items()}
    for name, (command, own) in (MEASURE | OTHERS).items():
        made = commands.add_parser(name, help=command.__doc__)
        made.set_defaults(command=command)
        for argument, how in ({**inherited, **own} if name in MEASURE else own).items():
            shared = argument in MEASURING and how is MEASURING[argument]
            made.add_argument(argument, **(inherited[argument] if shared else how))
    return top
