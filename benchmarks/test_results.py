"""The committed results: read as they were saved, claimed, printed and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import documents, plots, table
from benchmarks.environment import ROOT
from benchmarks.optimizer_step import MODEL, OWN, OWN_BF16, OWN_SPLIT, SMALL, STEP, TORCH
from benchmarks.release import bars
from benchmarks.results import Report

RESULTS = ROOT / "benchmarks" / "results" / "cpu"


@pytest.mark.parametrize(
    ("name", "rows", "claims"), [("claims.json", 18, 12), ("step.json", 6, 9), ("monitor.json", 5, 2)]
)
def test_the_bars_claim_the_same_of_committed_rows(name: str, rows: int, claims: int) -> None:
    report = Report.load(RESULTS / name)
    found = bars.claims(report)
    assert (len(report.rows), len(found), len(report.claims)) == (rows, claims, claims)
    then, now = (sorted((claim.value, claim.bar, claim.unit == "x") for claim in one) for one in (report.claims, found))
    for (value, *rest), (old, *others) in zip(now, then, strict=True):
        assert value == pytest.approx(old)
        assert rest == others


def test_steps_are_rows(tmp_path: Path) -> None:
    report = Report.load(RESULTS / "step.json")
    assert [(row.workload, row.operation) for row in report.rows] == [
        *((MODEL, "step, not clipped"), (MODEL, "unscale, not clipped")),
        *((MODEL, "step, clipped"), (MODEL, "unscale, clipped")),
        *((SMALL, "step, not clipped"), (SMALL, "step, clipped")),
    ]
    assert table.summary(report).count("\n| torch's clip ") == 2
    report.save(tmp_path / "now.json")
    assert Report.load(tmp_path / "now.json") == report


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        *(("claims.json", {"speedup"}), ("step.json", {"step"}), ("training.json", {"gpt", "lstm"})),
        *(("adaptive.json", {"adaptive"}), ("optimizers.json", {"optimizers"})),
    ],
)
def test_pictures_of_committed_results(name: str, pictures: set[str], tmp_path: Path) -> None:
    made = plots.draw_all(Report.load(RESULTS / name), tmp_path)
    assert {path.stem for path in made} == pictures
    assert all(path.stat().st_size > 10_000 for path in made)


def test_the_documents_say_what_the_results_say() -> None:
    for path in documents.DOCUMENTS:
        text = path.read_text()
        assert text.count("<!-- end -->") > 0
        assert documents.renewed(text, RESULTS) == text
        without = text
        for name in ("GPT-2 124M, fp32, clipped ", "clip ", "torch's AdamW and clip "):
            without = without.replace(f"| {name}", "| ")
        assert documents.renewed(without, RESULTS) == text != without


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"old\.json: schema 1, this version reads 2"):
        Report.load(tmp_path / "old.json")


def test_the_lstm_without_clipping_explodes_in_the_committed_curves() -> None:
    loose, clipped = Report.load(RESULTS / "training.json").training["lstm"]["runs"]
    assert (loose["outcome"], clipped["outcome"]) == ("diverged", "learned")
    assert max(loose["norms"]) > 10 * max(clipped["norms"])
    assert len(loose["norms"]) == len(loose["losses"]) == len(clipped["losses"])


def test_what_moves_fewer_bytes_loses_nothing_in_the_committed_curves() -> None:
    first, *others = Report.load(RESULTS / "optimizers.json").training["optimizers"]["runs"]
    assert len(first["losses"]) == 300
    assert [round(run["bytes_kept"]) for run in others] == [12, 8, 12]
    assert all(abs(run["last"] - first["last"]) < 0.01 for run in others)


def test_the_bytes_of_a_step_stand_in_its_rows() -> None:
    for row in Report.load(RESULTS / "step.json").rows:
        if row.operation.startswith("step"):
            moved = {one.contender: one.bytes_moved / row.elements for one in row.contenders}
            assert (moved[STEP], moved[TORCH], moved[OWN], moved[OWN_BF16], moved[OWN_SPLIT]) == (28, 40, 32, 24, 28)
