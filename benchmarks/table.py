"""Tables in Markdown that also read well in a terminal, made from a report only."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from math import isnan

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Measurement, Report, Row

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "mixed": "fp32 and bf16"}
MISSING = "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns padded; the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    head, *lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in (header, *rows)]
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in lines)])


def duration(us: float) -> str:
    divisor, form, unit = (1, ".1f", " us") if us < 1e3 else (1e3, ".2f", " ms") if us < 1e6 else (1e6, ".2f", " s")
    return short(us / divisor, form, unit)


def short(value: float, form: str, unit: str = "") -> str:
    return MISSING if isnan(value) else f"{value:{form}}{unit}"


def time_of(one: Measurement, us: float) -> str:
    return "failed" if one.failure else duration(us)


def label(row: Row) -> str:
    return f"{row.title}, {SHORT_DTYPE[row.dtype]}, {row.operation}"


def whole(report: Report, all_contenders: bool = False) -> str:
    """What was measured, and the claims if there are any."""
    rows = details(report) if all_contenders else summary(report)
    return f"{rows}\n\n{claims(report)}" if report.claims else rows


def clipping(rows: Iterable[Row]) -> str:
    """One line per row: torch's foreach path beside fusedclip's preferred engine."""
    header = ["gradients", "torch foreach", "fusedclip", "ratio", "GB/s", "of floor", "error torch", "error ours"]
    lines = []
    for row in rows:
        if (ours := row.ours) is not None:
            both = row.find(TORCH_FOREACH), ours
            times = [time_of(one, one.p50_us) for one in both]
            rates = short(ours.ratio_to_foreach, ".1f", "x"), short(ours.gb_per_s, ".1f")
            errors = [short(one.norm_error, ".0e") for one in both]
            lines.append([label(row), *times, *rates, short(ours.floor_fraction, ".0%"), *errors])
    return markdown(header, lines)


def stepping(rows: Iterable[Row]) -> str:
    """One line per way: its time with a limit that does not clip and one that does, and the ratio to the first way."""
    tables = []
    for title, same in groupby(rows, lambda row: row.title):
        lines: dict[str, list[str]] = {}
        for row in same:
            for one in row.contenders:
                ratio = short(one.device_us / row.contenders[0].device_us, ".2f")
                lines.setdefault(one.contender, []).extend((time_of(one, one.device_us), ratio))
        cells = [[name, *(known + [MISSING] * 4)[:4]] for name, known in lines.items()]
        tables.append(markdown([title, "not clipped", "ratio", "clipped", "ratio"], cells))
    return "\n\n".join(tables)


def summary(report: Report, clipping: Callable[[list[Row]], str] = clipping) -> str:
    """Everything at a glance: the README's tables."""
    clips, steps = [row for row in report.rows if not row.is_step], [row for row in report.rows if row.is_step]
    return "\n\n".join([clipping(clips)] * bool(clips) + [stepping(steps)] * bool(steps))


def details(report: Report) -> str:
    """Every contender of every row, failures with their reason."""
    times = ["p20", "p50", "p80", "MB moved", "GB/s", "of floor", "host", "ratio"]
    header = ["gradients / contender", *times, "norm error", "ulp"]
    lines = []
    for row in report.rows:
        lines.append([f"**{label(row)}** ({row.tensors:,} tensors)"] + [""] * 10)
        for one in [row.floor, *row.contenders]:
            name = f"{one.contender}: FAILED, {one.failure}" if one.failure else one.contender
            quantiles = map(duration, (one.p20_us, one.p50_us, one.p80_us))
            moved = short(one.bytes_moved / 1e6, ",.4g"), short(one.gb_per_s, ".1f"), short(one.floor_fraction, ".0%")
            ratio = short(one.ratio_to_foreach, ".2f", "x")
            errors = short(one.norm_error, ".0e"), short(one.ulp_error, ".2f")
            lines.append([name, *quantiles, *moved, duration(one.host_us), ratio, *errors])
    return markdown(header, lines)


def claims(report: Report) -> str:
    lines = []
    for one in report.claims:
        bar = f"{'>=' if one.more_is_better else '<='} {one.bar:g}"
        lines.append([one.name, f"{one.value:.3g}", bar, one.unit, "yes" if one.holds else "NO", one.note])
    return markdown(["claim", "measured", "bar", "unit", "holds", "note"], lines)


def where(report: Report) -> str:
    threads, versions = report.environment["threads"], report.environment["versions"]
    return f"{report.environment['device']}, {threads} thread{'s' * (threads > 1)}, torch {versions['torch']}"


def origin(report: Report) -> str:
    """The line under a table: what it was measured on."""
    version, commit = report.environment["versions"], report.environment["commit"]
    state = f"commit {commit['hash'][:10]}{' + changes' if commit['dirty'] else ''}" if commit["hash"] else "no commit"
    return (
        f"{where(report)}, Python {version['python']}, fusedclip {version['fusedclip']}, {state}, seed {report.seed}, "
        f"{report.environment['date'][:10]}. "
        "Medians of interleaved calls; the floor is the best of a family of plain loops over as many bytes."
    )
