"""Tables in Markdown that also read well in a terminal, made from a report only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.contenders import TORCH_FOREACH
from benchmarks.results import Claim, Measurement, Report, Row

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "mixed": "fp32 and bf16"}
MISSING = "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns padded; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *others])} |"

    rule = "|".join(("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":") for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def duration(us: float | None) -> str:
    if us is None:
        return MISSING
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if us < 1e3 * size:
            return f"{us / size:.{1 if unit == 'us' else 2}f} {unit}"
    return f"{us / 1e6:.2f} s"


def short(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


def label(row: Row) -> str:
    return f"{row.title}, {SHORT_DTYPE[row.dtype]}, {row.operation}"


def summary(report: Report) -> str:
    """Everything at a glance: the README's tables."""
    clips, steps = [row for row in report.rows if not row.is_step], [row for row in report.rows if row.is_step]
    return "\n\n".join(([clipping(clips)] if clips else []) + ([stepping(steps)] if steps else []))


def clipping(rows: Sequence[Row]) -> str:
    """One line per row: torch's foreach path beside fusedclip's preferred engine."""
    header = ["gradients", "torch foreach", "fusedclip", "ratio", "GB/s", "of read floor", "error torch", "error ours"]
    return markdown(header, [_clipping_line(row) for row in rows if row.ours is not None])


def _clipping_line(row: Row) -> list[str]:
    torch_, ours = row.find(TORCH_FOREACH) or Measurement(TORCH_FOREACH), row.ours or Measurement("fusedclip")
    return [
        label(row),
        *(time_of(one, one.p50_us) for one in (torch_, ours)),
        short(ours.ratio_to_foreach, ".1f", "x"),
        short(ours.gb_per_s, ".1f"),
        short(ours.floor_fraction, ".0%"),
        short(torch_.norm_error, ".0e"),
        short(ours.norm_error, ".0e"),
    ]


def stepping(rows: Sequence[Row]) -> str:
    """One line per way: its time with a limit that does not clip and one that does, and the ratio to the first way."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        base = row.contenders[0].device_us or 1.0
        for one in row.contenders:
            us = one.device_us
            lines.setdefault(one.contender, []).extend((time_of(one, us), short(us and us / base, ".2f")))
    header = ["", "not clipped", "ratio", "clipped", "ratio"]
    return markdown(header, [[name, *(cells + [MISSING] * 4)[:4]] for name, cells in lines.items()])


def time_of(one: Measurement, us: float | None) -> str:
    return "failed" if one.failure else duration(us)


def details(report: Report) -> str:
    """Every contender of every row, failures with their reason."""
    times = ["p20", "p50", "p80", "MB moved", "GB/s", "of floor", "host", "ratio"]
    header = ["gradients / contender", *times, "norm error", "ulp"]
    return markdown(header, [line for row in report.rows for line in _detail_rows(row)])


def _detail_rows(row: Row) -> Iterator[list[str]]:
    yield [f"**{label(row)}** ({row.tensors:,} tensors)"] + [""] * 10
    for one in [row.floor, *row.contenders]:
        name = f"{one.contender}: FAILED, {one.failure}" if one.failure else one.contender
        yield [
            name,
            *map(duration, (one.p20_us, one.p50_us, one.p80_us)),
            short(None if one.bytes_moved is None else one.bytes_moved / 1e6, ",.4g"),
            short(one.gb_per_s, ".1f"),
            short(one.floor_fraction, ".0%"),
            duration(one.host_us),
            short(one.ratio_to_foreach, ".2f", "x"),
            short(one.norm_error, ".0e"),
            short(one.ulp_error, ".2f"),
        ]


def claims(report: Report) -> str:
    header = ["claim", "measured", "bar", "unit", "holds", "note"]
    return markdown(header, [_claim_row(claim) for claim in report.claims])


def _claim_row(claim: Claim) -> list[str]:
    sign = ">=" if claim.more_is_better else "<="
    return [
        claim.name,
        f"{claim.value:.3g}",
        f"{sign} {claim.bar:g}",
        claim.unit,
        "yes" if claim.holds else "NO",
        claim.note,
    ]


def origin(report: Report) -> str:
    """The line under a table: what it was measured on."""
    environment = report.environment
    version, commit = environment["versions"], environment["commit"]
    state = f"commit {commit['hash'][:10]}{' + changes' if commit['dirty'] else ''}" if commit["hash"] else "no commit"
    return (
        f"{environment['device']}, {environment['threads']} threads, torch {version['torch']}, "
        f"Python {version['python']}, fusedclip {version['fusedclip']}, {state}, seed {report.seed}, "
        f"{environment['date'][:10]}. Medians of interleaved calls; the floor is a plain sum over as many bytes."
    )
