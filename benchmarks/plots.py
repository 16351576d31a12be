"""PNG files from a report: speed-up, roofline, training curves. Nothing is measured here."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import Patch

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Report, Row
from benchmarks.suites import BOTH
from benchmarks.table import SHORT_DTYPE, where
from benchmarks.train.experiments import GUESSING

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666", "#000000",
)  # fmt: skip
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
    pictures = {"speedup": speedup, "roofline": roofline, "gpt": gpt, "lstm": lstm, "adaptive": adaptive}
    made = []
    with pyplot.rc_context(STYLE):
        for name, draw in pictures.items():
            if title := draw(report):
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


def gpt(report: Report) -> str:
    """The loss curves of both clips, one upon the other, and how far they are apart."""
    if not (result := report.training.get("gpt")):
        return ""
    _, axes = pyplot.subplots(figsize=(8, 4))
    for run, colour, width in zip(result["runs"], (ORANGE, BLUE), (5.0, 1.2), strict=True):
        axes.plot(run["losses"], color=colour, linewidth=width, label=run["name"])
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend()
    difference = result["largest_difference"]
    apart = "of different length" if difference is None else f"at most {difference:.1g} apart"
    return f"A small GPT, clipped by torch and by fusedclip: the losses are {apart}"


def lstm(report: Report) -> str:
    """Gradient norm and loss over the steps, without clipping and with it: what an exploding gradient looks like."""
    if not (result := report.training.get("lstm")):
        return ""
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


def adaptive(report: Report) -> str:
    """What garbage costs each contender: its loss above that of a run that was spared it, and its norm."""
    if not (result := report.training.get("adaptive")):
        return ""
    spared, *runs = result["runs"]
    colours = (GREY, BLACK, ORANGE, BLUE, GREEN, VERMILION)
    _, panels = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 2))
    first, last = result["spikes"][0], result["spikes"][-1]
    start, end, highest = max(0, first - 40), min(len(spared["losses"]), last + 80), 0.1
    for run, colour in zip(runs, colours, strict=True):
        excess = np.array(run["losses"], float) - spared["losses"]
        excess[first : last + 1] = math.nan
        excess = smoothed(excess)
        if run is not runs[0]:  # without clipping it leaves the picture
            highest = max(highest, *excess[last + 1 : end])
        how = {"color": colour, "linewidth": 1.6, "linestyle": "--" if run is runs[0] else "-"}
        panels[0].plot(excess, label=f"{run['name']}: {run['cost']:+.2f}", **how)
        panels[1].semilogy(run["norms"], **how)
    for axes in panels:
        axes.axvspan(first - 0.5, last + 0.5, color=GREY, alpha=0.25, linewidth=0)
    panels[0].set(ylim=(-0.15, 1.15 * highest), xlim=(start, end))
    panels[0].set_ylabel("loss above that of a run without\nthe garbage (mean of 5 steps)")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="mean of the 20 steps after")
    panels[1].set(xlabel="step", ylabel="gradient norm\nbefore clipping")
    return f"A small GPT meets {last - first + 1} batches of random bytes (grey)"


def smoothed(values: Any, width: int = 5) -> Any:
    """Means of those that are numbers."""
    padded = np.concatenate([np.full(width - 1, math.nan), values])
    return np.ma.masked_invalid(sliding_window_view(padded, width)).mean(axis=1).filled(math.nan)
