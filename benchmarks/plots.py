"""PNG files from a report: speed-up, host cost, bandwidth, training curves. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.operations import Operation
from benchmarks.results import Measurement, Report, Row
from benchmarks.table import SHORT_DTYPE

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
INCHES_PER_BAR = 0.26


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every picture for which the report has data; the paths of those that were made."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Report], bool]] = {
        "speedup": speedup,
        "host-cost": host_cost,
        "bandwidth": bandwidth,
        "roofline": roofline,
        "training": training,
    }
    made = []
    for name, draw in pictures.items():
        if draw(report):
            made.append(folder / f"{name}.png")
            pyplot.savefig(made[-1], dpi=150, bbox_inches="tight")
        pyplot.close("all")
    return made


def timed(row: Row) -> Measurement | None:
    return row.ours if row.ours and row.ours.p50_us else None


def speedup(report: Report) -> bool:
    """Torch foreach's time over fusedclip's, a bar per dtype, workloads and operations below each other."""
    rows = [row for row in report.rows if not row.is_host and timed(row) and row.find(TORCH_FOREACH)]
    names = list(dict.fromkeys((row.workload, row.operation) for row in rows))
    if not names:
        return False
    axes = _bars_figure(len(rows), len(names))
    _grouped_bars(axes, rows, [f"{workload_title(rows, one[0])}\n{one[1]}" for one in names], names)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(ticks := _ticks(rows), [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    ratios = [ratio(row) for row in rows]
    axes.set_xlim(0.8 * min(1.0, *ratios), 1.4 * max(2.0, *ratios))
    axes.set_xlabel("time of torch's foreach path / time of fusedclip (log scale)")
    axes.set_title(f"Gradient clipping, fusedclip against torch\n{where(report)}", fontsize=10)
    return True


def _bars_figure(bars: int, groups: int) -> Axes:
    _, axes = pyplot.subplots(figsize=(8, 1.4 + INCHES_PER_BAR * bars + 0.2 * groups))
    return axes


def workload_title(rows: list[Row], workload: str) -> str:
    """Without the cut if that differs between the dtypes."""
    titles = {row.title for row in rows if row.workload == workload}
    title = titles.pop()
    return title if not titles else title.partition(" (")[0]


def _ticks(rows: list[Row]) -> list[float]:
    lowest, highest = min(map(ratio, rows)), max(map(ratio, rows))
    wanted = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    return [tick for tick in wanted if min(1.0, 0.8 * lowest) <= tick <= max(2.0, 1.4 * highest)]


def ratio(row: Row) -> float:
    return (row.ours.ratio_to_foreach if row.ours else None) or 0.0


def _grouped_bars(axes: Axes, rows: list[Row], labels: list[str], names: list[tuple[str, str]]) -> None:
    position, middles = 0.0, []
    for name in names:
        group = [row for row in rows if (row.workload, row.operation) == name]
        for offset, row in enumerate(group):
            axes.barh(position + offset, ratio(row) - 1, 0.85, left=1, color=DTYPE_COLOURS[row.dtype])
            axes.text(max(1.0, ratio(row)) * 1.03, position + offset, f"{ratio(row):.1f}x", va="center", fontsize=8)
        middles.append(position + (len(group) - 1) / 2)
        position += len(group) + 0.8
    axes.set_yticks(middles, labels, fontsize=8)
    axes.set_ylim(position - 0.5, -1)
    present = [dtype for dtype in DTYPE_COLOURS if any(row.dtype == dtype for row in rows)]
    handles = [Patch(color=DTYPE_COLOURS[dtype]) for dtype in present]
    axes.legend(handles, [SHORT_DTYPE[dtype] for dtype in present], loc="lower right", fontsize=8)


def host_cost(report: Report) -> bool:
    """Time of a call over the number of tensors, one panel per tensor size, both axes logarithmic."""
    rows = [row for row in report.rows if row.is_host]
    sizes = sorted({row.elements // row.tensors for row in rows})
    if not rows:
        return False
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5.2 * len(sizes), 4.2), sharey=True, squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        _host_panel(axes, [row for row in rows if row.elements == size * row.tensors], size)
    panels[0][0].set_ylabel("time of a call that does not clip (us)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"Cost per call over the number of tensors\n{where(report)}", fontsize=10)
    figure.tight_layout()
    return True


def _host_panel(axes: Axes, rows: list[Row], size: int) -> None:
    for name, colour in CONTENDER_COLOURS.items():
        found = [(row.tensors, one.p50_us) for row in rows if (one := row.find(name)) and one.p50_us]
        if found:
            axes.plot(*zip(*sorted(found), strict=True), marker="o", markersize=4, color=colour, label=name)
    counts = sorted(row.tensors for row in rows)
    allowed = [10 + 0.12 * count for count in counts]
    axes.plot(counts, allowed, color=GREY, linestyle="--", label="10 us + 0.12 us per tensor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"tensors of {size} elements")
    axes.grid(True, which="major", alpha=0.3)


def bandwidth(report: Report) -> bool:
    """Bytes of the gradients per second of calls that only have to read them, beside what a plain sum reads."""
    rows = [
        row
        for row in report.rows
        if not row.is_host and timed(row) and row.operation == Operation.NOT_CLIPPED.value and row.bytes >= 16 << 20
    ]
    if not rows:
        return False
    axes = _bars_figure(3 * len(rows), len(rows))
    for index, row in enumerate(rows):
        _bandwidth_bars(axes, row, index * 3.7, labelled=index == 0)
    middles = [index * 3.7 + 1 for index in range(len(rows))]
    axes.set_yticks(middles, [f"{row.title}\n{SHORT_DTYPE[row.dtype]}" for row in rows], fontsize=8)
    axes.set_ylim(3.7 * len(rows) - 0.7, -1)
    axes.margins(x=0.12)
    axes.set_xlabel("bytes of gradients / time of the call (GB/s)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    title = "clip_grad_norm_ that does not clip, against reading the same bytes once"
    axes.set_title(f"{title}\n{where(report)}", fontsize=10)
    return True


def _bandwidth_bars(axes: Axes, row: Row, top: float, labelled: bool) -> None:
    bars = (("read floor", row.floor, GREY), ("fusedclip", timed(row), BLUE))
    for offset, (name, one, colour) in enumerate((*bars, (TORCH_FOREACH, row.find(TORCH_FOREACH), VERMILION))):
        if one and one.p50_us:
            rate = row.bytes / (one.device_us or one.p50_us) / 1e3
            axes.barh(top + offset, rate, 0.85, color=colour, label=name if labelled else None)
            axes.text(rate, top + offset, f" {rate:.1f}", va="center", fontsize=8)


def roofline(report: Report) -> bool:
    """Gradient bytes per second over the bytes of a list, below what the memory's ceilings allow; device times.

    Clipping does two operations per element: every call is below the memory's roof, so size takes the place of
    arithmetic intensity.
    """
    ceilings, operations = report.gpu.get("ceilings"), (Operation.NOT_CLIPPED.value, Operation.CLIPPED.value)
    rows = [row for row in report.rows if row.operation in operations and not row.is_host]
    if not ceilings or not rows:
        return False
    roofs = (ceilings["read"], 1 / (1 / ceilings["read"] + 2 / ceilings["copy"]))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), sharex=True)
    for axes, operation, roof, passes in zip(
        panels, operations, roofs, ("1 N read", "1 N read, 2 N copied"), strict=True
    ):
        _roof_panel(axes, [row for row in rows if row.operation == operation], roof)
        axes.set_title(f"{operation} (roof: {passes})", fontsize=10)
    panels[0].set_ylabel("bytes of gradients / time on the device (GB/s)")
    figure.suptitle(where(report), fontsize=10)
    figure.tight_layout()
    return True


def _roof_panel(axes: Axes, rows: list[Row], roof: float) -> None:
    for name in (TORCH_FOREACH, "fusedclip cuda", "fusedclip triton", "fusedclip cpu"):
        found = [(row.bytes, one.device_us) for row in rows if (one := row.find(name)) and one.device_us]
        if found:
            rates = [nbytes / us / 1e3 for nbytes, us in found]
            axes.scatter([nbytes for nbytes, _ in found], rates, s=18, color=CONTENDER_COLOURS[name], label=name)
    axes.axhline(roof, color=GREY, linestyle="--", linewidth=1, label=f"roof: {roof:,.0f} GB/s")
    axes.legend(fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes of gradients")
    axes.grid(True, which="major", alpha=0.3)


def training(report: Report) -> bool:
    """The loss curves of the experiments, beside each other."""
    if not report.training:
        return False
    figure, panels = pyplot.subplots(1, len(report.training), figsize=(5.2 * len(report.training), 4), squeeze=False)
    for axes, (name, result) in zip(panels[0], report.training.items(), strict=True):
        _curves(axes, name, result)
    figure.suptitle(where(report), fontsize=10)
    figure.tight_layout()
    return True


def _curves(axes: Axes, name: str, result: dict[str, Any]) -> None:
    for run, (colour, style) in zip(
        result["runs"], ((VERMILION, "-"), (BLUE, "--" if name == "gpt" else "-")), strict=True
    ):
        losses = [float("nan") if loss is None else loss for loss in run["losses"]]
        axes.plot(losses, color=colour, linestyle=style, linewidth=1.5, label=run["name"])
    if name == "lstm":
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per byte (nats)")
    axes.set_title(_finding(name, result), fontsize=10)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)


def _finding(name: str, result: dict[str, Any]) -> str:
    if name == "gpt":
        difference = result["largest_difference"]
        return f"GPT, largest difference of the curves {'infinite' if difference is None else f'{difference:.1g}'}"
    return f"LSTM, rate {result['learning_rate']:g}: " + ", ".join(
        f"{run['name']} {run['outcome']}" for run in result["runs"]
    )


def where(report: Report) -> str:
    environment = report.environment
    return f"{environment['device']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
