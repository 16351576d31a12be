"""The committed results: read as they were saved, claimed, printed and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plots, table
from benchmarks.environment import ROOT
from benchmarks.release import bars
from benchmarks.results import Report

RESULTS = ROOT / "benchmarks" / "results" / "cpu"


@pytest.mark.parametrize(("name", "rows", "claims"), [("claims.json", 18, 12), ("step.json", 4, 4)])
def test_the_bars_claim_the_same_of_committed_rows(name: str, rows: int, claims: int) -> None:
    report = Report.load(RESULTS / name)
    found = bars.claims(report)
    assert (len(report.rows), len(found), len(report.claims)) == (rows, claims, claims)
    then, now = (sorted((claim.value, claim.bar, claim.unit == "x") for claim in one) for one in (report.claims, found))
    for (value, *rest), (old, *others) in zip(now, then, strict=True):
        assert value == pytest.approx(old)
        assert rest == others


def test_steps_of_the_first_schema_are_rows(tmp_path: Path) -> None:
    report = Report.load(RESULTS / "step.json")
    assert [row.operation for row in report.rows] == [
        *("step, not clipped", "unscale, not clipped"),
        *("step, clipped", "unscale, clipped"),
    ]
    assert "| torch's clip                |    74.15 ms |  1.75 | 69.85 ms |  1.77 |" in table.summary(report)
    report.save(tmp_path / "now.json")
    assert Report.load(tmp_path / "now.json") == report


@pytest.mark.parametrize(
    ("name", "pictures"), [("claims.json", {"speedup", "host-cost"}), ("training.json", {"gpt", "lstm"})]
)
def test_pictures_of_committed_results(name: str, pictures: set[str], tmp_path: Path) -> None:
    made = plots.draw_all(Report.load(RESULTS / name), tmp_path)
    assert {path.stem for path in made} == pictures
    assert all(path.stat().st_size > 10_000 for path in made)


def test_the_lstm_without_clipping_explodes_in_the_committed_curves() -> None:
    loose, clipped = Report.load(RESULTS / "training.json").training["lstm"]["runs"]
    assert (loose["outcome"], clipped["outcome"]) == ("diverged", "learned")
    assert max(loose["norms"]) > 10 * max(clipped["norms"])
    assert len(loose["norms"]) == len(loose["losses"]) == len(clipped["losses"])
