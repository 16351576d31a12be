"""PNG files from a report: speed-up, steps, roofline, training curves. Nothing is measured here."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.optimizer_step import NO_LIMIT, OWN, STEP
from benchmarks.palette import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from benchmarks.results import Report
from benchmarks.suites import BOTH
from benchmarks.table import label, where
from benchmarks.train import adaptive, optimizers
from benchmarks.train.experiments import GUESSING, Result

CONTENDER_COLOURS = {
    TORCH_FOREACH: VERMILION, "torch loop": ORANGE, "torch.compile": PURPLE,
    "fusedclip cpu": BLUE, "fusedclip cuda": BLUE, "fusedclip cuda, two launches": GREY,
    "fusedclip triton": SKY, "fusedclip reference": GREEN,
}  # fmt: skip
HOST = "host-"  # tensors so small that the host's own work is what such a row measures
STYLE: Any = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every picture for which the report has data; the paths of those that were made."""
    folder.mkdir(parents=True, exist_ok=True)
    made, data = [], dict.fromkeys(OF_ROWS, report) | report.training
    with pyplot.rc_context(STYLE):
        for name, shown in data.items():
            if title := (OF_ROWS | OF_TRAINING)[name](shown):
                pyplot.suptitle(f"{title}\n{where(report)}")
                made.append(folder / f"{name}.png")
                pyplot.savefig(made[-1], dpi=120, bbox_inches="tight")
            pyplot.close("all")
    return made


def speedup(report: Report) -> str:
    """Torch foreach's time over fusedclip's, a bar for each row."""
    ratios = {label(row): row.ours.ratio_to_foreach for row in report.rows if row.ours and HOST not in row.workload}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    if not ratios:
        return ""
    _, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(ratios)))
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


def steps(report: Report) -> str:
    """A panel for each limit and a bar for each way: its update alone, and what the clip adds to that.

    The floor of a way is its bytes at the highest rate that any way of its row has reached.
    """
    rows = [row for row in report.rows if row.operation.startswith("step, ") and row.find(STEP).bytes_moved > 0]
    rows = [row for row in rows if row.workload == rows[0].workload]
    if not rows:
        return ""
    _, panels = pyplot.subplots(1, len(rows), figsize=(11, 4.2), sharey=True, sharex=True, squeeze=False)
    for row, axes in zip(rows, panels[0], strict=True):
        rate = max(one.gb_per_s for one in row.contenders if one.gb_per_s > 0)
        shown = [one for one in row.contenders if not one.contender.endswith(NO_LIMIT)]
        for y, way in enumerate(shown):
            own = row.find(way.contender + NO_LIMIT)  # that way's step without a clip, or else torch's fused one
            alone = (own if own.device_us > 0 else row.find(STEP)).device_us / 1e3
            whole, floor = way.device_us / 1e3, way.bytes_moved / rate / 1e6
            axes.barh(y, min(alone, whole), 0.7, color=BLUE if way.contender.startswith(OWN) else SKY)
            axes.barh(y, max(0.0, whole - alone), 0.7, left=alone, color=ORANGE)
            axes.vlines(floor, y - 0.45, y + 0.45, color=BLACK, linewidth=2.5)
            each = f", {way.bytes_moved / row.elements:.0f} B" if way.bytes_moved > 0 else ""
            axes.text(whole, y, f"  {whole:.0f} ms{each}", va="center")
        axes.set_yticks(range(len(shown)), [one.contender for one in shown])
        axes.set(title=f"{row.operation.removeprefix('step, ')}; floor at {rate:.0f} GB/s", xlabel="ms per step")
        axes.grid(visible=False, axis="y")
    panels[0][0].invert_yaxis()
    panels[0][0].set_xlim(right=1.4 * max(one.device_us / 1e3 for row in rows for one in row.contenders))
    marks = [*(Patch(color=colour) for colour in (SKY, BLUE, ORANGE)), Line2D([], [], color=BLACK, linewidth=2.5)]
    words = ("torch's update", "our update", "what the clip adds", "floor: bytes over the highest rate of the panel")
    pyplot.gcf().legend(marks, words, loc="outside lower center", ncols=4, frameon=False)
    return f"One AdamW step of {rows[0].title}: time, and bytes per parameter"


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
        rows = [row for row in report.rows if row.operation == operation.value and HOST not in row.workload]
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
OF_ROWS: dict[str, Any] = {"speedup": speedup, "step": steps, "roofline": roofline}
OF_TRAINING = {"gpt": gpt, "lstm": lstm, "adaptive": adaptive.picture, "optimizers": optimizers.picture}
