"""A picture of the rows of steps: the time of each way by pass, and the least that its bytes would take."""

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.optimizer_step import NO_LIMIT, OWN, STEP
from benchmarks.palette import BLACK, BLUE, ORANGE, SKY
from benchmarks.results import Measurement, Report, Row

BAR = 0.7


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
            alone, floor = update(row, way).device_us / 1e3, way.bytes_moved / rate / 1e6
            whole = way.device_us / 1e3
            axes.barh(y, min(alone, whole), BAR, color=BLUE if way.contender.startswith(OWN) else SKY)
            axes.barh(y, max(0.0, whole - alone), BAR, left=alone, color=ORANGE)
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


def update(row: Row, way: Measurement) -> Measurement:
    """That way's step without a clip: torch's fused one, if it has none of its own."""
    own = row.find(way.contender + NO_LIMIT)
    return own if own.device_us > 0 else row.find(STEP)
