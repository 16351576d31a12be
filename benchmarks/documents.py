"""The tables of the documents, made from the committed results: what stands between two comments is replaced."""

from pathlib import Path

from benchmarks import table
from benchmarks.environment import ROOT
from benchmarks.results import Report
from benchmarks.train.optimizers import summary

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
DOCUMENTS = [ROOT / name for name in ("README.md", "benchmarks/README.md", "docs/monitor.md", "docs/optim.md")]
# Workload, dtype and operation of the README's rows.
SPEED = (
    ("gpt2", "float32", "not clipped"),
    ("gpt2", "float32", "clipped"),
    ("gpt2", "bfloat16", "not clipped"),
    ("1000x256", "float32", "not clipped"),
    ("5000x64", "float32", "clipped"),
    ("one-2^26", "float32", "not clipped"),
)


def tables(results: Path) -> dict[str, str]:
    """By the name in the comment, what belongs there."""
    names = "claims", "step", "monitor", "training", "optimizers"
    claims, step, monitor, training, optimizers = (Report.load(results / f"{name}.json") for name in names)
    rows = {row.key[:3]: row for row in claims.rows}
    torchs, ours = (f"{run['clip_share']:.2%}" for run in training.training["gpt"]["runs"])
    apart = training.training["gpt"]["largest_difference"]
    return {
        "speed": (
            f"{table.clipping([rows[key] for key in SPEED])}\n\n{table.origin(claims)}\n"
            f"End to end, expect little where clipping was little: in the main job's GPT ({table.where(training)}) it\n"
            f"took {torchs} of a step with torch, {ours} with fusedclip, the loss curves at most {apart:.0e} apart."
        ),
        "claims": f"{table.summary(claims)}\n\n{table.claims(claims)}\n\n{table.origin(claims)}",
        "monitor": f"{table.summary(monitor)}\n\n{table.origin(monitor)}",
        "optimizers": f"{summary(optimizers.training['optimizers'])}\n{table.where(optimizers)}.",
        "step": f"{table.summary(step)}\n\n{table.claims(step)}\n\n{table.origin(step)}",
    }


def renewed(text: str, results: Path) -> str:
    """The document with the tables of these results."""
    for name, made in tables(results).items():
        before, begin, rest = text.partition(f"<!-- {name}: made by `python -m benchmarks results` -->\n")
        if begin:
            text = f"{before}{begin}{made}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def renew(results: Path = RESULTS) -> None:
    for path in DOCUMENTS:
        path.write_text(renewed(path.read_text(), results))
        print(f"renewed {path}")
