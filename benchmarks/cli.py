"""The command line: one function per command, and the options of each."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import documents, environment, health, optimizer_step, table
from benchmarks import versus as versions
from benchmarks.compare import compare
from benchmarks.contenders import Contender, line_up
from benchmarks.gpu import command as gpu_run
from benchmarks.measure import Settings, run_suite
from benchmarks.release import bars, sources
from benchmarks.results import Report, Row
from benchmarks.suites import DTYPES, SUITES, Suite, select
from benchmarks.train.experiments import EXPERIMENTS, to_tensorboard
from benchmarks.workloads import CATALOGUE, GIB

RESULT = Path("benchmark-results") / "main.json"
# The results that the documents show.
MADE_BY = {"claims": "run --suite claims", "step": "step", "monitor": "monitor", "training": "train"}
MADE_BY |= {name: f"train --{name}" for name in ("adaptive", "optimizers")}

Options = argparse.Namespace
progress_bar = partial(tqdm, dynamic_ncols=True)  # on stderr
# Of what several commands share. argparse has to know of none: the default of a command's own parser would overwrite
# what stands before the command.
DEFAULTS: dict[str, Any] = {"device": "cpu", "seed": 0, "repeats": 2000, "memory": 1.0}
DEFAULTS |= dict.fromkeys(("threads", "out", "quick", "compile", "contender", "logdir"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return int(options.command(options))
    except (ValueError, KeyError, FileNotFoundError) as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 2


def everything(options: Options) -> int:
    """The main job: both training experiments, then a short table against torch, and pictures of both."""
    options.out = options.out or RESULT
    report = new_report(options, "quick")
    train_all(report, options, "gpt", "lstm")
    print("\nClipping alone, against torch:\n")
    measure_all(report, options, select("quick", quick=options.quick))
    return finish(report, options, table.summary(report))


def run(options: Options) -> int:
    """Measure a suite."""
    report = new_report(options, options.suite)
    measure_all(report, options, select(options.suite, options.dtype, options.workload, options.quick))
    return finish(report, options, table.whole(report, options.details))


def train(options: Options) -> int:
    """The training experiments only, or how adaptive rules take a spike, or our optimizers beside torch's."""
    report = new_report(options, "train")
    names = [name for name in ("adaptive", "optimizers") if getattr(options, name)]
    train_all(report, options, *(names or ["gpt", "lstm"]))
    if names:
        options.out = options.out or RESULT.with_name(f"{names[0]}.json")
    return finish(report, options)


def tune(options: Options) -> int:
    """Measure the Triton engine's tuning table."""
    from benchmarks import tune as tuning

    path = tuning.file_for(torch.device(options.device), options.out)
    options.memory = max(options.memory, tuning.LEAST_GIB)
    with progress_bar(unit=" candidates judged") as bar:
        results = tuning.tune_all(options.dtype or DTYPES, settings_of(options), options.quick, path, bar)
    for result in results:
        print(f"{tuning.table(result)}\n\n{result.key[1]}: {result.verdict}\n")
    print(f"{table.origin(new_report(options, 'tune'))}\nsaved {path}")
    return int(any(result.candidates[0].failure for result in results))


def step(options: Options) -> int:
    """What clipping adds to a fused AdamW step, our own AdamW beside it, and unscaling with clipping."""
    return ways(options, "step", optimizer_step.measure)


def monitor(options: Options) -> int:
    """What a monitor adds to clipping, and statistics to norms."""
    return ways(options, "monitor", health.measure)


def ways(options: Options, name: str, measure: Callable[[Settings, float], Iterable[Row]]) -> int:
    """Rows of ways to do the same."""
    report = new_report(options, name)
    report.rows += measure(settings_of(options), 4.0 if options.quick else 15.0)
    report.claims = bars.claims(report)
    return finish(report, options, table.whole(report))


def results(options: Options) -> int:
    """All that the documents show: the claims, the step and the training, measured again, and the documents renewed."""
    folder, wrong = options.out or documents.RESULTS, 0
    for name, command in MADE_BY.items():
        one = parse(command.split(), **vars(options) | {"out": folder / f"{name}.json"})
        if options.no_measuring:
            draw(Report.load(one.out), folder)
        else:
            wrong += one.command(one)
    documents.renew(folder)
    return wrong


def gpu(options: Options) -> int:
    """Everything that has to be shown on a GPU: checks, ceilings, rows, steps; under 9 minutes on an H100."""
    options.device = gpu_run.served(torch.device(options.device))
    stages = [name for name in options.only or gpu_run.STAGES if name not in options.without]
    with progress_bar(bar_format="{desc} [{elapsed}]") as bar:
        how = settings_of(options), options.quick, options.out, options.minutes, bar.set_description
        report = gpu_run.Run(*how).all(stages)
    options.out /= gpu_run.FILE
    finish(report, options, f"{gpu_run.summary(report)}\n\n{table.claims(report)}\n\n{gpu_run.machine(report)}")
    return int(gpu_run.failed(report))


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
    report = new_report(options, options.suite)
    suite = versions.select(options.suite, options.workload, options.seconds, options.quick)
    with progress_bar(unit="row", total=options.starts * len(suite.cases)) as bar:
        outcome = versions.run(report, suite, options, bar.update)
    return finish(report, options) or outcome


def plot(options: Options) -> int:
    """PNG files from a result."""
    draw(Report.load(options.file), options.out or options.file.parent)
    return 0


def show(options: Options) -> int:
    """The tables of a result."""
    report = Report.load(options.file)
    if not options.claims:
        report.claims = []
    print(f"{table.whole(report, options.details)}\n\n{table.origin(report)}")
    return 0


def new_report(options: Options, suite: str) -> Report:
    return Report(environment.describe(torch.device(options.device)), suite, options.seed)


def settings_of(options: Options, contenders: Sequence[Contender] = ()) -> Settings:
    return Settings(torch.device(options.device), contenders, int(options.memory * GIB), options.seed, options.repeats)


def measure_all(report: Report, options: Options, suite: Suite) -> None:
    by_name = {one.name: one for one in line_up(torch.device(options.device), options.compile)}
    wanted = options.contender or list(by_name)
    if unknown := [name for name in wanted if name not in by_name]:
        raise ValueError(f"no contender {', '.join(unknown)} here; there are {', '.join(by_name)}")
    settings = settings_of(options, [by_name[name] for name in wanted])
    with progress_bar(unit="row", total=len(suite.cases)) as bar:
        for row in run_suite(suite, settings, lambda case: bar.set_description(str(case))):
            report.rows.append(row)
            wrong = [one for one in row.contenders if one.failure]
            failed = [f"not timed, failed the oracle: {one.contender}: {one.failure}" for one in wrong]
            for warning in filter(None, [row.disturbance, *failed]):
                bar.write(f"{table.label(row)}: {warning}", sys.stderr)
            bar.update()
    report.claims = bars.claims(report)


def train_all(report: Report, options: Options, *names: str) -> None:
    for name in names:
        steps, experiment, summary = EXPERIMENTS[name]
        steps //= 4 if options.quick else 1
        with progress_bar(unit="step", total=steps, desc=f"training {name}") as bar:
            report.training[name] = experiment(options.seed, steps, bar.update)
        print(f"\n{name.upper()}:\n\n{summary(report.training[name])}\n")
    if options.logdir:
        to_tensorboard(options.logdir, report.training)


def finish(report: Report, options: Options, shown: str = "") -> int:
    """Show the tables and where they were measured; save and draw if asked; 1 if fusedclip was wrong anywhere."""
    print(f"{shown}\n\n{table.origin(report)}")
    if options.out:
        report.save(options.out)
        print(f"saved {options.out}")
        draw(report, options.out.parent)
    return int(report.wrong)


def draw(report: Report, folder: Path) -> None:
    """The pictures, if there is something to draw them with."""
    try:
        from benchmarks import plots
    except ImportError as missing:
        print(f"no pictures: {missing}; python -m benchmarks plot makes them where matplotlib is installed")
    else:
        for path in plots.draw_all(report, folder):
            print(f"drew {path}")


DETAILS = "every contender, not only torch foreach and fusedclip"
FLAG: dict[str, Any] = {"action": "store_true"}
EACH: dict[str, Any] = {"action": "append", "default": []}
FOLDER: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE.json"}


def parse(arguments: Sequence[str] | None = None, **given: Any) -> Options:
    shared: dict[str, Any] = {"add_help": False, "argument_default": argparse.SUPPRESS}
    every = argparse.ArgumentParser(**shared)
    every.add_argument("--seed", type=int)
    every.add_argument("--quick", help="fewer steps, a third of the time per row", **FLAG)
    measuring = argparse.ArgumentParser(**shared, parents=[every])
    add = measuring.add_argument
    add("--device", help="cpu or cuda")
    add("--threads", help="CPU threads (default: torch's)", type=int)
    add("--out", help=f"keep the result (without a command: {RESULT})", **FILE)
    add("--repeats", help="rounds per row at most", type=int)
    add("--memory", help="GiB of gradients; larger models are cut to it", type=float)
    add("--compile", help="torch.compile takes part (compiles for about 30 s)", **FLAG)
    add("--contender", help="only these, by name", action="append")
    add("--logdir", help="write the training curves for TensorBoard", **FOLDER)

    manual = "Measures fusedclip; benchmarks/README.md is the manual."
    top = argparse.ArgumentParser("python -m benchmarks", description=manual, parents=[measuring])
    top.set_defaults(command=everything)
    commands = top.add_subparsers(title="commands", description="without one: train, then a short table")

    def has(name: str, function: Callable[[Options], int], *parents: argparse.ArgumentParser) -> Any:
        """The function that adds options of its own."""
        made = commands.add_parser(name, help=function.__doc__, parents=parents)
        made.set_defaults(command=function)
        return made.add_argument

    add = has("run", run, measuring)
    add("--suite", choices=SUITES, default="default")
    add("--dtype", help="only this one (default: the suite's own)", choices=DTYPES, **EACH)
    add("--workload", help="only these of the suite", choices=CATALOGUE, **EACH)
    add("--details", help=DETAILS, **FLAG)
    add = has("train", train, measuring)
    add("--adaptive", help="AutoClip, ZClip, AdaGC and SkipSpikes beside a fixed limit", **FLAG)
    add("--optimizers", help="torch's AdamW beside ours, in fp32, with bf16 moments, with a split master", **FLAG)
    add = has("tune", tune, measuring)
    add("--dtype", help="only this one (default: all)", choices=DTYPES, **EACH)
    has("step", step, measuring)
    has("monitor", monitor, measuring)
    add = has("results", results, measuring)
    add("--no-measuring", help="renew pictures and documents from what is there", **FLAG)
    add = has("versus", versus, measuring)
    add("old", help="the interpreter of an environment", type=Path, metavar="PYTHON_OLD")
    add("new", help="that of another", type=Path, metavar="PYTHON_NEW")
    add("--suite", choices=versions.ALL_SUITES, default="claims")
    add("--workload", help="only these of the suite", **EACH)
    add("--seconds", help="per row, all processes together (default: by the suite)", type=float)
    add("--starts", help="the seconds are shared by so many fresh processes", type=int, default=3)
    add = has("gpu", gpu, every)
    add("--out", help="for the JSON and the pictures", required=True, **FOLDER)
    add("--device", help="cuda, or cuda:N", default="cuda")
    add("--memory", help="GiB of gradients; takes about five times as much", type=float, default=2.0)
    add("--minutes", help="begin nothing after them, and end what hangs", type=float, default=9.0)
    add("--only", help="this stage", choices=gpu_run.STAGES, **EACH)
    add("--without", help="leave out this stage", choices=gpu_run.STAGES, **EACH)
    add = has("distributed", distributed, every)
    add("--nproc", help="processes at most; 8 for the whole weak-scaling table", type=int, default=4)
    add("--out", help="keep the result", **FILE)
    add = has("status", status)
    add("--results", help="look for results below it", default=sources.RESULTS, **FOLDER)
    add = has("compare", compare_files)
    add("first", **FILE)
    add("second", **FILE)
    add = has("plot", plot)
    add("file", **FILE)
    add("--out", help="default: beside the file", **FOLDER)
    add = has("table", show)
    add("file", **FILE)
    add("--details", help=DETAILS, **FLAG)
    add("--claims", help="and the project's bars", **FLAG)
    return top.parse_args(arguments, Options(**DEFAULTS | given))
