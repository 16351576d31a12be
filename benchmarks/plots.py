"""PNG files from a report: speed-up, roofline, training curves. Nothing is measured here."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import Patch

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.palette import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from benchmarks.results import Report, Row
from benchmarks.step_picture import steps
from benchmarks.suites import BOTH
from benchmarks.table import SHORT_DTYPE, where
from benchmarks.train import adaptive, optimizers
from benchmarks.train.experiments import GUESSING, Result

DTYPE_COLOURS = {"float32": BLUE, "bfloat16": ORANGE, "float16": GREEN, "mixed": PURPLE}
CONTENDER_COLOURS = {
    TORCH_FOREACH: VERMILION, "torch loop": ORANGE, "torch.compile": PURPLE,
    "fusedclip cpu": BLUE, "fusedclip cuda": BLUE, "fusedclip cuda, two launches": GREY,
    "fusedclip triton": SKY, "fusedclip reference": GREEN,
}  # fmt: skip
BAR = 0.28  # inches
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
}


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every picture for which the report has data; the paths of those that were made."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with pyplot.rc_context(STYLE):
        training = {name: partial(OF_TRAINING[name], result) for name, result in report.training.items()}
        for name, draw in ({name: partial(draw, report) for name, draw in OF_ROWS.items()} | training).items():
            if title := draw():
                pyplot.suptitle(f"{title}\n{where(report)}")
                made.append(folder / f"{name}.png")
                pyplot.savefig(made[-1], dpi=120, bbox_inches="tight")
            pyplot.close("all")
    return made


def speedup(report: Report) -> str:
    """Torch foreach's time over fusedclip's, a bar per dtype, workloads and operations below each other."""
    rows = [row for row in report.rows if not row.is_host and ratio(row) > 0]
    if not rows:
        return ""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.operation), []).append(row)
    _, axes = pyplot.subplots(figsize=(8, 1.2 + BAR * (len(rows) + 0.8 * len(groups))))
    position, ticks = 0.0, {}
    for group in groups.values():
        for offset, row in enumerate(group):
            axes.barh(position + offset, ratio(row) - 1, 0.85, left=1, color=DTYPE_COLOURS[row.dtype])
            text = f"{SHORT_DTYPE[row.dtype]}  {ratio(row):.1f}x"
            axes.text(max(1.0, ratio(row)) * 1.03, position + offset, text, va="center")
        # Without the cut if that differs between the dtypes.
        title = group[0].title if len({row.title for row in group}) == 1 else group[0].title.partition(" (")[0]
        separator = ", " if len(group) == 1 else ",\n"
        ticks[position + (len(group) - 1) / 2] = f"{title}{separator}{group[0].operation}"
        position += len(group) + 0.8
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(position - 0.8, -0.8)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    left, right = min(0.95, 0.8 * min(map(ratio, rows))), 1.7 * max(2.0, *map(ratio, rows))
    shown = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left <= tick <= right]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.minorticks_off()
    axes.grid(False)
    axes.set(xlim=(left, right), xlabel="torch's time / fusedclip's (log scale); torch is its foreach path")
    dtypes = dict.fromkeys(row.dtype for row in rows)
    axes.legend([Patch(color=DTYPE_COLOURS[one]) for one in dtypes], [SHORT_DTYPE[one] for one in dtypes], loc="best")
    return "How many times faster than torch's is fusedclip's clip_grad_norm_?"


def ratio(row: Row) -> float:
    return row.ours.ratio_to_foreach if row.ours else 0.0


def roofline(report: Report) -> str:
    """Gradient bytes per second over the bytes of a list, below what the memory's ceilings allow; device times.

    Clipping does two operations per element: every call is below the memory's roof, so size takes the place of
    arithmetic intensity.
    """
    ceilings = report.gpu.get("ceilings")
    if not ceilings or not report.rows:
        return ""
    roofs = (ceilings["read"], 1 / (1 / ceilings["read"] + 2 / ceilings["copy"]))
    _, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    for axes, operation, roof, passes in zip(panels, BOTH, roofs, ("1 N read", "1 N read, 2 N copied"), strict=True):
        rows = [row for row in report.rows if row.operation == operation.value and not row.is_host]
        for name, colour in CONTENDER_COLOURS.items():
            timed = [(row.bytes, row.bytes / us / 1e3) for row in rows if (us := row.find(name).device_us) > 0]
            if timed:
                axes.loglog(*zip(*timed, strict=True), ".", markersize=5, color=colour, label=name)
        axes.axhline(roof, color=GREY, linestyle="--", linewidth=1, label=f"roof: {roof:,.0f} GB/s")
        axes.legend()
        axes.set_title(f"{operation.value} (roof: {passes})", fontsize=10)
        axes.set_xlabel("bytes of gradients")
    panels[0].set_ylabel("bytes of gradients / time on the device (GB/s)")
    return "How close is clipping to the memory's roof?"


def gpt(result: Result) -> str:
    """The loss curves of both clips, one upon the other, and how far they are apart."""
    _, axes = pyplot.subplots(figsize=(8, 4))
    for run, colour, width in zip(result["runs"], (ORANGE, BLUE), (5.0, 1.2), strict=True):
        axes.plot(run["losses"], color=colour, linewidth=width, label=run["name"])
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend()
    difference = result["largest_difference"]
    apart = "of different length" if difference is None else f"at most {difference:.1g} apart"
    return f"A small GPT, clipped by torch and by fusedclip: the losses are {apart}"


def lstm(result: Result) -> str:
    """Gradient norm and loss over the steps, without clipping and with it: what an exploding gradient looks like."""
    _, panels = pyplot.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    max_norm = result["max_norm"]
    loose, clipped = result["runs"]
    runs = {"not clipped": (loose, VERMILION), f"fusedclip, max_norm={max_norm:g}": (clipped, BLUE)}
    norms = "norms", "gradient norm\nbefore clipping", max_norm, " max_norm"
    losses = "losses", "loss (nats per byte)", GUESSING, " guessing"
    for axes, (values, label, level, text) in zip(panels, (norms, losses), strict=True):
        for name, (run, colour) in runs.items():
            axes.semilogy(run[values], color=colour, linewidth=1.5, label=f"{name}: {run['outcome']}")
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.text(1.0, level, text, transform=axes.get_yaxis_transform(), va="center", color=GREY)
        axes.set_ylabel(label)
    panels[0].set_ylim(bottom=max_norm / 1.5)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    panels[1].set_xlabel("step")
    return f"An LSTM, plain SGD with a rate of {result['learning_rate']:g}"


# By their names, which are those of the files; of a training experiment the result is what is drawn.
OF_ROWS = {"speedup": speedup, "step": steps, "roofline": roofline}
OF_TRAINING = {"gpt": gpt, "lstm": lstm, "adaptive": adaptive.picture, "optimizers": optimizers.picture}
