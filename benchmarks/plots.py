"""PNG files from a report: speed-up, roofline, training curves. Nothing is measured here."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.palette import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from benchmarks.results import Report
from benchmarks.step_picture import steps
from benchmarks.suites import BOTH
from benchmarks.table import label, where
from benchmarks.train import adaptive, optimizers
from benchmarks.train.experiments import GUESSING, Result

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
    """Torch foreach's time over fusedclip's, a bar for each row."""
    ratios = {label(row): row.ours.ratio_to_foreach for row in report.rows if row.ours and not row.is_host}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    if not ratios:
        return ""
    _, axes = pyplot.subplots(figsize=(8, 1.2 + BAR * len(ratios)))
    values, colours = list(ratios.values()), [BLUE if "not clipped" in name else ORANGE for name in ratios]
    bars = axes.barh(list(ratios), [value - 1 for value in values], left=1, color=colours)
    axes.bar_label(bars, [f"{value:.1f}x" for value in values], padding=3)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.grid(visible=False)
    limits = min(0.95, 0.8 * min(values)), 1.3 * max(2.0, *values)
    axes.set(xlim=limits, xlabel="torch's time / fusedclip's (log scale); torch is its foreach path")
    return "How many times faster than torch's is fusedclip's clip_grad_norm_?"


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
    for axes, (values, title, level, text) in zip(panels, (norms, losses), strict=True):
        for name, (run, colour) in runs.items():
            axes.semilogy(run[values], color=colour, linewidth=1.5, label=f"{name}: {run['outcome']}")
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.text(1.0, level, text, transform=axes.get_yaxis_transform(), va="center", color=GREY)
        axes.set_ylabel(title)
    panels[0].set_ylim(bottom=max_norm / 1.5)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    panels[1].set_xlabel("step")
    return f"An LSTM, plain SGD with a rate of {result['learning_rate']:g}"


# By their names, which are those of the files; of a training experiment the result is what is drawn.
OF_ROWS = {"speedup": speedup, "step": steps, "roofline": roofline}
OF_TRAINING = {"gpt": gpt, "lstm": lstm, "adaptive": adaptive.picture, "optimizers": optimizers.picture}
