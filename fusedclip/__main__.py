"""`python -m fusedclip`: what is on this machine, which engine serves what, and why not the others. Always prints.

`python -m fusedclip check` prints that and runs every engine against the reference; see `check.py`.
`python -m fusedclip report RUN.jsonl` shows what a `GradMonitor` wrote there.
`python -m fusedclip run -m MODULE ...` (or a script) runs it with torch's clipping functions redirected to ours.
"""

import argparse
import mmap
import os
import platform
import runpy
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch

from . import __version__, _extension, backends, check, clip, patch_torch

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _extension_line() -> str:
    c = _extension.C
    if c is None:
        return f"none: {_extension.reason}"
    threads = "torch's threads" if c.has_threads else "one thread (its compiler cannot use torch's OpenMP)"
    cuda = f"CUDA half for {c.cuda_architectures}" if c.cuda_architectures else "built without a CUDA half"
    return f"{', '.join(c.instruction_sets())} (first is used); {threads}; {cuda}"


def _devices() -> str:
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _patterns() -> str:
    """How the CPU engine goes through memory."""

    def said(streams: int, ahead: int, by_page: bool) -> str:
        turns = "one stream" if streams == 1 else f"{streams} streams turn about"
        return f"{turns}, asking for each {'page' if by_page else 'line'} {ahead:,} bytes ahead" if ahead else turns

    read, write = _extension.C.patterns()
    return f"read in {said(*read)}; written in {said(*write)} (FUSEDCLIP_CPU_PATTERN changes it)"


def _pages() -> str:
    """Which pages the memory of torch's large tensors is in, and what larger ones would bring."""
    chosen = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else "[never]"
    if "[always]" in chosen or ("[madvise]" in chosen and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"):
        return "2 MiB"
    if "[never]" in chosen:
        return "the system's own alone (it is not set to give larger ones to programs that ask)"
    small, large = _read_rates([mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE])
    return f"4 KiB; with THP_MEM_ALLOC_ENABLE=1 2 MiB, in which a norm reads {large:.0f} GB/s instead of {small:.0f}"


def _read_rates(advices: list[int], size: int = 128 << 20, rounds: int = 15) -> list[float]:
    """GB/s of a norm over so many bytes in each kind of pages, taken in turns."""
    times: list[list[float]] = [[] for _ in advices]
    lists = []
    for advice in advices:
        memory = mmap.mmap(-1, size)
        memory.madvise(advice)
        lists.append([torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)])
    with backends.use("cpu"):
        for _, (gradients, spent) in product(range(rounds), zip(lists, times, strict=True)):
            start = time.perf_counter()
            clip.get_total_norm(gradients)
            spent.append(time.perf_counter() - start)
    return [size / statistics.median(spent) / 1e9 for spent in times]


def describe() -> None:
    python = f"Python {platform.python_version()} on {platform.machine()}"
    print(f"fusedclip  {__version__}, torch {torch.__version__}, {python}")
    print(f"extension  {_extension_line()}")
    print(f"devices    {_devices()}")
    if "cpu" in backends.available():
        print(f"memory     {_patterns()}")
        print(f"pages      {_pages()}")
    print("engines, in order of preference (all of float32, float64, bfloat16, float16):")
    print("  " + backends.explain().replace("\n", "\n  "))


def report(arguments: argparse.Namespace) -> int:
    """What a monitored run tells: the summary, the limit to take, a picture."""
    from .monitor import History
    from .monitor.picture import draw

    try:
        history = History.read(arguments.run)
        print(history.summary())
        if arguments.plot:
            draw(history, arguments.plot)
            print(f"drew {arguments.plot}")
        print(history.suggest_max_norm(arguments.clip_rate))
    except (OSError, ValueError, ModuleNotFoundError) as problem:
        print(f"fusedclip report: {problem}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> int:
    """A program under `patch_torch()`, as python itself would run it."""
    sys.argv = [arguments.program, *arguments.arguments]
    patch_torch()
    if arguments.m:
        runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments.program))
        runpy.run_path(arguments.program, run_name="__main__")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser("python -m fusedclip", description="What is here, and which engine serves what.")
    commands = parser.add_subparsers(dest="command", title="commands")
    commands.add_parser("check", help="compare every engine with the reference as well")
    reporting = commands.add_parser(
        "report", help="summary, suggestion and picture of a run that a GradMonitor recorded"
    )
    reporting.add_argument("run", metavar="RUN.jsonl")
    reporting.add_argument("--plot", metavar="OUT.png", help="draw it (needs matplotlib)")
    reporting.add_argument("--clip-rate", type=float, default=0.1, help="of the suggested limit (default: %(default)s)")
    running = commands.add_parser("run", help="run a program after patch_torch()")
    running.add_argument("-m", action="store_true", help="the program is a module's name, not a script")
    running.add_argument("program")
    running.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    arguments = parser.parse_args()
    if arguments.command in ("report", "run"):
        return (report if arguments.command == "report" else run)(arguments)
    describe()
    return check.main() if arguments.command == "check" else 0


if __name__ == "__main__":
    sys.exit(main())
