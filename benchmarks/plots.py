"""PNG files from a report: speed-up, host cost, roofline, training curves. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.release.bars import HOST, HOST_US, HOST_US_PER_TENSOR
from benchmarks.results import Report, Row
from benchmarks.suites import BOTH
from benchmarks.table import SHORT_DTYPE
from benchmarks.train.experiments import GUESSING

# Okabe and Ito's palette, which the common kinds of colour blindness tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666",
)  # fmt: skip
DTYPE_COLOURS = {"float32": BLUE, "bfloat16": ORANGE, "float16": GREEN, "mixed": PURPLE}
CONTENDER_COLOURS = {
    TORCH_FOREACH: VERMILION,
    "torch loop": ORANGE,
    "torch.compile": PURPLE,
    "fusedclip cpu": BLUE,
    "fusedclip cuda": BLUE,
    "fusedclip triton": SKY,
    "fusedclip reference": GREEN,
}
BAR = 0.28  # inches


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every picture for which the report has data; the paths of those that were made."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Report], bool]] = {
        "speedup": speedup,
        "host-cost": host_cost,
        "roofline": roofline,
        "gpt": gpt,
        "lstm": lstm,
    }
    made = []
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        for name, draw in pictures.items():
            if draw(report):
                made.append(folder / f"{name}.png")
                pyplot.savefig(made[-1], dpi=120, bbox_inches="tight")
            pyplot.close("all")
    return made


def speedup(report: Report) -> bool:
    """Torch foreach's time over fusedclip's, a bar per dtype, workloads and operations below each other."""
    rows = [row for row in report.rows if not row.is_host and ratio(row)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.operation), []).append(row)
    if not rows:
        return False
    _, axes = pyplot.subplots(figsize=(8, 1.2 + BAR * (len(rows) + 0.8 * len(groups))))
    position, ticks = 0.0, {}
    for (_, operation), group in groups.items():
        for offset, row in enumerate(group):
            axes.barh(position + offset, ratio(row) - 1, 0.85, left=1, color=DTYPE_COLOURS[row.dtype])
            text = f"{SHORT_DTYPE[row.dtype]}  {ratio(row):.1f}x"
            axes.text(max(1.0, ratio(row)) * 1.03, position + offset, text, va="center")
        titles = {row.title for row in group}  # without the cut if that differs between the dtypes
        title = titles.pop() if len(titles) == 1 else titles.pop().partition(" (")[0]
        ticks[position + (len(group) - 1) / 2] = f"{title},\n{operation}" if len(group) > 1 else f"{title}, {operation}"
        position += len(group) + 0.8
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(position - 0.8, -0.8)
    axes.axvline(1, color=GREY, linewidth=1)
    highest, lowest = max(map(ratio, rows)), min(map(ratio, rows))
    axes.set_xscale("log")
    left, right = min(0.95, 0.8 * lowest), 1.7 * max(2.0, highest)
    axes.set_xlim(left, right)
    shown = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left <= tick <= right]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.minorticks_off()
    axes.set_xlabel("torch's time / fusedclip's (log scale); torch is its foreach path")
    dtypes = dict.fromkeys(row.dtype for row in rows)
    axes.legend([Patch(color=DTYPE_COLOURS[one]) for one in dtypes], [SHORT_DTYPE[one] for one in dtypes], loc="best")
    axes.set_title(f"How many times faster than torch: clip_grad_norm_ on {where(report)}", fontsize=10, loc="right")
    return True


def ratio(row: Row) -> float:
    return (row.ours.ratio_to_foreach if row.ours else None) or 0.0


def host_cost(report: Report) -> bool:
    """Time of a call over the number of tensors, one panel per tensor size, both axes logarithmic."""
    rows = [row for row in report.rows if row.is_host]
    sizes = sorted({row.elements // row.tensors for row in rows})
    if not rows:
        return False
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(6 * len(sizes), 4.2), sharey=True, squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        of_size = [row for row in rows if row.elements == size * row.tensors]
        counts = sorted(row.tensors for row in of_size)
        for name, colour in CONTENDER_COLOURS.items():
            found = [(row.tensors, one.p50_us) for row in of_size if (one := row.find(name)) and one.p50_us]
            if found:
                axes.plot(*zip(*sorted(found), strict=True), marker="o", markersize=4, color=colour, label=name)
        allowed = [HOST_US + HOST_US_PER_TENSOR * count for count in counts]
        axes.plot(counts, allowed, color=GREY, linestyle="--", label=HOST.strip("()"))
        _log_log(axes, f"tensors of {size} elements")
    panels[0][0].set_ylabel("time of a call that does not clip (us)")
    panels[0][0].legend()
    figure.suptitle(f"Cost per call over the number of tensors\n{where(report)}", fontsize=10)
    figure.tight_layout()
    return True


def roofline(report: Report) -> bool:
    """Gradient bytes per second over the bytes of a list, below what the memory's ceilings allow; device times.

    Clipping does two operations per element: every call is below the memory's roof, so size takes the place of
    arithmetic intensity.
    """
    ceilings = report.gpu.get("ceilings")
    if not ceilings or not report.rows:
        return False
    roofs = (ceilings["read"], 1 / (1 / ceilings["read"] + 2 / ceilings["copy"]))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    for axes, operation, roof, passes in zip(panels, BOTH, roofs, ("1 N read", "1 N read, 2 N copied"), strict=True):
        rows = [row for row in report.rows if row.operation == operation.value and not row.is_host]
        for name in (TORCH_FOREACH, "fusedclip cuda", "fusedclip triton", "fusedclip cpu"):
            found = [(row.bytes, one.device_us) for row in rows if (one := row.find(name)) and one.device_us]
            if found:
                rates = [nbytes / us / 1e3 for nbytes, us in found]
                axes.scatter([nbytes for nbytes, _ in found], rates, s=18, color=CONTENDER_COLOURS[name], label=name)
        axes.axhline(roof, color=GREY, linestyle="--", linewidth=1, label=f"roof: {roof:,.0f} GB/s")
        axes.legend()
        axes.set_title(f"{operation.value} (roof: {passes})", fontsize=10)
        _log_log(axes, "bytes of gradients")
    panels[0].set_ylabel("bytes of gradients / time on the device (GB/s)")
    figure.suptitle(where(report), fontsize=10)
    figure.tight_layout()
    return True


def _log_log(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.grid(True, which="major", alpha=0.3)


def gpt(report: Report) -> bool:
    """The loss curves of both clips, one upon the other, and how far they are apart."""
    result = report.training.get("gpt")
    if not result:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for run, colour, width in zip(result["runs"], (ORANGE, BLUE), (5.0, 1.2), strict=True):
        axes.plot(curve(run["losses"]), color=colour, linewidth=width, label=run["name"])
    difference = result["largest_difference"]
    apart = "of different length" if difference is None else f"at most {difference:.1g} apart"
    axes.set_title(
        f"A small GPT, clipped by torch and by fusedclip: the losses are {apart}\n{where(report)}", fontsize=10
    )
    axes.set_ylabel("loss (nats per byte)")
    axes.set_xlabel("step")
    axes.legend()
    return _finished(figure, axes)


def lstm(report: Report) -> bool:
    """Gradient norm and loss over the steps, without clipping and with it: what an exploding gradient looks like."""
    result = report.training.get("lstm")
    if not result:
        return False
    figure, panels = pyplot.subplots(2, 1, figsize=(8, 5.6), sharex=True)
    labels = ("not clipped", f"fusedclip, max_norm={result['max_norm']:g}")
    for axes, values in zip(panels, ("norms", "losses"), strict=True):
        for run, label, colour in zip(result["runs"], labels, (VERMILION, BLUE), strict=True):
            axes.semilogy(curve(run[values]), color=colour, linewidth=1.5, label=f"{label}: {run['outcome']}")
    panels[0].axhline(result["max_norm"], color=GREY, linestyle="--", linewidth=1)
    panels[0].set_ylabel("gradient norm\nbefore clipping")
    panels[0].set_ylim(bottom=result["max_norm"] / 1.5)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    panels[1].axhline(GUESSING, color=GREY, linestyle="--", linewidth=1)
    panels[1].set_ylabel("loss (nats per byte)")
    panels[1].set_xlabel("step")
    figure.suptitle(f"An LSTM, plain SGD with a rate of {result['learning_rate']:g}\n{where(report)}", fontsize=10)
    for axes, level, text in zip(panels, (result["max_norm"], GUESSING), (" max_norm", " guessing"), strict=True):
        axes.text(1.0, level, text, transform=axes.get_yaxis_transform(), va="center", color=GREY)
    return _finished(figure, *panels)


def curve(values: list[float | None]) -> list[float]:
    """JSON has null for what was not finite."""
    return [math.nan if value is None else value for value in values]


def _finished(figure: Any, *panels: Axes) -> bool:
    for axes in panels:
        axes.grid(True, alpha=0.3)
    figure.align_ylabels()
    figure.tight_layout()
    return True


def where(report: Report) -> str:
    environment = report.environment
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    return f"{environment['device']}, {threads}, torch {environment['versions']['torch']}"
