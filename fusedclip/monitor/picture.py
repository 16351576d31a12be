"""The picture of a run: the norm over the steps, its distribution, and every layer's. Needs matplotlib."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .history import History, quantile
from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the common kinds of colour blindness tell apart; viridis serves them, too.
BLUE, VERMILION, GREY, LIGHT, WHITE, BLACK = "#0072B2", "#D55E00", "#767676", "#BBBBBB", "#FFFFFF", "#222222"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
LINES = 48  # layers that can be told apart by name
BINS = 60
_BROKEN, _ABSENT = -1.0, -2.0  # in place of a norm


def draw(history: History, path: str | Path) -> None:
    """To a file, in the format that its ending names.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if nothing has been recorded.
    """
    if not history.records:
        raise ValueError("nothing has been recorded yet, so there is nothing to draw")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"the directory of {str(path)!r} does not exist; make it first")
    rc_context, figure_of = _matplotlib()
    has_layers = any(norm and norm < math.inf for row in history.layers for norm in row)
    rows = min(max(len(history.names), 6), LINES) if has_layers else 0
    with rc_context(STYLE):
        figure = figure_of(figsize=(12, 4.6 + 0.19 * rows))
        ratios = [3.6, 1.0 + 0.19 * rows] if has_layers else [1.0]
        grid = figure.add_gridspec(len(ratios), 2, height_ratios=ratios, width_ratios=[4, 1])
        over_steps = figure.add_subplot(grid[0, 0])
        _norms(over_steps, history.records)
        _distribution(figure.add_subplot(grid[0, 1], sharey=over_steps), history.records)
        if has_layers:
            _layers(figure.add_subplot(grid[1, 0], sharex=over_steps), figure.add_subplot(grid[1, 1]), history)
        figure.suptitle(_title(history), fontsize=12)
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def _matplotlib() -> tuple[Any, Any]:
    """Without pyplot: the windows and the backend of the caller's own figures are left alone."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'fusedclip[plots]', or read summary() and suggest_max_norm() instead"
        ) from None
    return rc_context, Figure


def _title(history: History) -> str:
    records = history.records
    clipped = sum(record.clipped for record in records) / len(records)
    text = (
        f"Gradient norm of {len(history.names)} parameters over {len(records):,} recorded steps: {clipped:.1%} clipped"
    )
    broken = sum(not math.isfinite(record.norm) for record in records)
    return text + (f", {broken} not finite" if broken else "")


def _norms(axes: "Axes", records: Sequence[Record]) -> None:
    seen = [record for record in records if 0 < record.norm < math.inf]
    axes.plot(
        [r.step for r in seen], [r.norm for r in seen], color=BLUE, linewidth=1, label="norm before clipping", zorder=2
    )
    held = [r for r in seen if r.clipped]
    size = 14 if len(held) < 150 else 4  # the line stays to be seen
    axes.scatter(
        [r.step for r in held], [r.norm for r in held], s=size, color=VERMILION, marker="v", zorder=3, label="clipped"
    )
    limits = [(r.step, r.limit) for r in records if r.limit is not None and 0 < r.limit < math.inf]
    if limits:
        axes.step(
            *zip(*limits, strict=True), where="mid", color=BLACK, linewidth=1.6, linestyle="--", label="limit", zorder=4
        )
    broken = [r.step for r in records if not math.isfinite(r.norm)]
    if broken:
        top = axes.get_xaxis_transform()
        axes.scatter(
            broken, [0.98] * len(broken), s=40, color=BLACK, marker="x", transform=top, zorder=5, label="NaN or inf"
        )
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="gradient norm (log scale)")
    axes.margins(x=0.01)
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _distribution(axes: "Axes", records: Sequence[Record]) -> None:
    norms = sorted(record.norm for record in records if 0 < record.norm < math.inf)
    if not norms:
        return
    low, high = math.log10(norms[0]) - 0.01, math.log10(norms[-1]) + 0.01
    edges = [10 ** (low + (high - low) * i / BINS) for i in range(BINS + 1)]
    counts, _, _ = axes.hist(norms, bins=edges, orientation="horizontal", color=BLUE, alpha=0.75)
    for percent in (50, 90, 99):
        value = quantile(norms, percent / 100)
        axes.axhline(value, color=GREY, linewidth=1)
    axes.set_xlim(0, 1.05 * float(max(counts)))
    _label_percentiles(axes, norms)
    axes.tick_params(which="both", labelleft=False)
    axes.set_xlabel("steps")


def _label_percentiles(axes: "Axes", norms: Sequence[float]) -> None:
    """At the right, apart from each other."""
    bottom, top = (math.log10(end) for end in axes.get_ylim())
    least, last = (top - bottom) * 0.06, -math.inf
    for percent in (50, 90, 99):
        value = quantile(norms, percent / 100)
        place = max(math.log10(value), last + least)
        axes.annotate(
            f"p{percent} {value:.3g}", (1.0, value), xytext=(1.02, 10**place), textcoords=axes.get_yaxis_transform(),
            xycoords=axes.get_yaxis_transform(), va="center", color=BLACK, fontsize=9, annotation_clip=False,
        )  # fmt: skip
        last = place


def _layers(axes: "Axes", scale: "Axes", history: History) -> None:
    """A row for each parameter, and beside them what the colours mean."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = [[_seen(norm) for norm in row] for row in zip(*history.layers, strict=True)]
    steps = history.layer_steps
    edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]

    def paint(wanted: Callable[[float], bool], **how: Any) -> Any:
        masked = [[norm if wanted(norm) else math.nan for norm in row] for row in rows]
        return axes.pcolormesh(edges, range(len(rows) + 1), masked, rasterized=True, **how)

    shades = paint(lambda norm: norm > 0, norm=_shades(rows), cmap="viridis")
    odd = {"NaN or inf": (_BROKEN, VERMILION), "zero": (0.0, WHITE), "no gradient": (_ABSENT, LIGHT)}
    kinds = {norm for row in rows for norm in row if norm <= 0}
    shown = {name: (kind, colour) for name, (kind, colour) in odd.items() if kind in kinds}
    for kind, colour in shown.values():
        paint(lambda norm, kind=kind: norm == kind, cmap=ListedColormap([colour]))  # type: ignore[misc]
    _name_rows(axes, history.names)
    axes.set_xlabel("step")
    assert axes.figure is not None
    bar = axes.figure.colorbar(shades, cax=scale.inset_axes((0.0, 0.0, 0.12, 1.0)), extend="both")
    bar.set_label("norm (log scale)")
    scale.axis("off")
    if shown:
        handles = [Patch(facecolor=colour, edgecolor=GREY, label=name) for name, (_, colour) in shown.items()]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False)


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    each = math.ceil(len(names) / LINES)
    title = "each parameter's gradient" + (f" (one name in {each})" if each > 1 else "")
    axes.set_title(title, loc="left", fontsize=10)
    shown = range(0, len(names), each)
    axes.set_yticks([i + 0.5 for i in shown], [_short(names[i]) for i in shown], fontsize=7.5, parse_math=False)
    axes.invert_yaxis()


def _shades(rows: Sequence[Sequence[float]]) -> Any:
    """From nearly the smallest to nearly the largest norm: a spike must not take all colours."""
    from matplotlib.colors import LogNorm

    positive = sorted(norm for row in rows for norm in row if norm > 0)
    low, high = quantile(positive, 0.005), quantile(positive, 0.995)
    return LogNorm(low, max(high, low * 1.01))


def _seen(norm: float | None) -> float:
    """As the heat map has it."""
    if norm is None:
        return _ABSENT
    return norm if math.isfinite(norm) else _BROKEN


def _short(name: str, most: int = 34) -> str:
    """The end of a name says more than its beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
