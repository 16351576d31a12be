"""The committed results: read as they were saved, claimed, printed and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import documents, plots, table
from benchmarks.environment import ROOT
from benchmarks.release import bars
from benchmarks.results import Report

RESULTS = ROOT / "benchmarks" / "results" / "cpu"


@pytest.mark.parametrize(
    ("name", "rows", "claims"), [("claims.json", 18, 12), ("step.json", 4, 4), ("monitor.json", 5, 2)]
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
    assert [row.operation for row in report.rows] == [
        *("step, not clipped", "unscale, not clipped"),
        *("step, clipped", "unscale, clipped"),
    ]
    assert table.summary(report).count("\n| torch's clip ") == 1
    report.save(tmp_path / "now.json")
    assert Report.load(tmp_path / "now.json") == report


@pytest.mark.parametrize(
    ("name", "pictures"),
    [("claims.json", {"speedup"}), ("training.json", {"gpt", "lstm"}), ("adaptive.json", {"adaptive"})],
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
        without = text.replace("| GPT-2 124M, fp32, clipped ", "| GPT-2 ").replace("| clip ", "| ")
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
