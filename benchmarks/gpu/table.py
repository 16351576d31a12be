"""What a GPU result looks like in print, from its report alone."""

from benchmarks import table
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.release.bars import CUDA, TRITON, missing
from benchmarks.results import Report, Row
from benchmarks.table import label, markdown, short, time_of


def summary(report: Report) -> str:
    """One line per row: the device's own times, then wall times, torch's foreach path beside the engines."""
    header = ["gradients", "torch foreach", "cuda", "triton", "ratio", "of read floor"]
    header += ["wall: torch", "cuda", "ratio", "host: torch", "cuda"]
    return table.summary(report, lambda rows: markdown(header, list(map(_line, rows))))


def _line(row: Row) -> list[str]:
    torchs, cuda, triton = map(row.find, (TORCH_FOREACH, CUDA, TRITON))
    return [
        label(row),
        *(time_of(one, one.device_us) for one in (torchs, cuda, triton)),
        short(torchs.device_us / cuda.device_us, ".2f", "x"),
        short(cuda.floor_fraction, ".0%"),
        *(time_of(one, one.p50_us) for one in (torchs, cuda)),
        short(torchs.p50_us / cuda.p50_us, ".2f", "x"),
        *(time_of(one, one.host_us) for one in (torchs, cuda)),
    ]


def machine(report: Report) -> str:
    """Ceilings and checks, a line each."""
    found, lines = report.gpu, []
    if ceilings := found.get("ceilings"):
        read = f"read {ceilings['read']:,.0f} GB/s ({ceilings['read_by']})"
        lines.append(f"ceilings: {read}, copy {ceilings['copy']:,.0f} GB/s ({ceilings['copy_by']})")
    for check in found.get("checks", []):
        last = check["output"].splitlines()[-1:] if check["outcome"] != "passed" or check["name"] == "tests" else []
        lines.append(" ".join([f"{check['name']}: {check['outcome']} ({check['seconds']:.0f} s)", *last]))
    lines += [f"promised, and not measured: {name}" for name in missing(report)]
    return "\n".join(lines)
