"""What `python -m benchmarks status` says of made-up checkouts and results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.release import sources
from benchmarks.release.test_bars import empty_report


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A few kernel sources, and a result measured on them."""
    for name in ("csrc/tiling.h", "csrc/cuda/lift.cuh", "fusedclip/backends/triton/kernels.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    save_result(tmp_path, "h100/gpu.json", "2026-01-02")
    return tmp_path


def save_result(root: Path, name: str, date: str, outcome: str = "passed", files: dict[str, str] | None = None) -> None:
    report = empty_report()
    report.environment["date"] = date
    report.gpu["sources"] = sources.hashes(root) if files is None else files
    report.gpu["checks"] = [{"name": name, "outcome": outcome} for name in sources.NEEDED]
    report.save(root / "results" / name)


def status_of(root: Path) -> sources.Status | None:
    return sources.status(root / "results", root)


def test_results_cover_the_sources_they_were_measured_on(checkout: Path) -> None:
    found = status_of(checkout)
    assert found is not None
    assert found.covered
    assert len(found.files) == 3
    assert "cover the kernels as they are" in sources.summary(found)


@pytest.mark.parametrize(
    ("change", "name", "state"),
    [
        (lambda path: path.write_text("other"), "csrc/cuda/lift.cuh", "changed"),
        (lambda path: path.write_text(""), "csrc/cuda/another.cuh", "new"),
        (lambda path: path.unlink(), "csrc/tiling.h", "gone"),
    ],
)
def test_any_change_is_seen(checkout: Path, change: Callable[[Path], object], name: str, state: str) -> None:
    change(checkout / name)
    found = status_of(checkout)
    assert found is not None
    assert not found.covered
    assert found.files[name] == state
    assert [other for other, what in found.files.items() if what != "as measured"] == [name]
    assert "do NOT cover" in sources.summary(found)


def test_the_newest_result_counts_and_only_with_its_tests_passed(checkout: Path) -> None:
    save_result(checkout, "h200/gpu.json", "2026-01-03", outcome="timed out")
    found = status_of(checkout)
    assert found is not None
    assert found.result.parent.name == "h200"
    assert not found.covered
    assert found.lacks == ["build: timed out", "tests: timed out"]
    save_result(checkout, "again/gpu.json", "2026-01-04")
    save_result(checkout, "old/gpu.json", "2025-01-04", files={"csrc/tiling.h": "0"})
    assert (found := status_of(checkout)) is not None
    assert found.covered


def test_no_results_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--results", str(tmp_path)]) == 1
    assert "no GPU results yet" in capsys.readouterr().out


def test_the_kernels_sources_are_found() -> None:
    names = sources.hashes()
    assert {"csrc/norm_ops.h", "csrc/cuda/on_chip.cuh", "fusedclip/backends/triton/tuning.json"} <= names.keys()
    assert not [name for name in names if name.startswith("csrc/cpu")]
