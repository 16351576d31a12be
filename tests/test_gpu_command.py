"""`python -m benchmarks gpu` from its first line to its JSON, behind a GPU that is not there.

Only what needs a real one is replaced: the checks in processes of their own. What torch's functions refuse on a GPU
they refuse here.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cli, timing
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.gpu import ceilings, command
from benchmarks.release import checks
from benchmarks.release.checks import Check, Task
from benchmarks.results import Report
from benchmarks.suites import Suite, select

from .fake_gpu import fake_gpu

WORKLOADS = {"host-10x8", "100x20000"}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few MB, and a few rounds of each row."""
    nothing = [sys.executable, "-c", "print('nothing')"]
    monkeypatch.setattr(checks, "smoke", lambda: Task("smoke", nothing, 60.0, {}))
    monkeypatch.setattr(checks, "tests", lambda: Task("tests", nothing, 60.0, {}))
    monkeypatch.setattr(checks, "sanitizers", lambda: [Check("compute-sanitizer", "left out")])
    measure = ceilings.measure
    monkeypatch.setattr(ceilings, "measure", lambda *arguments: measure(*arguments, nbytes=1 << 20))
    monkeypatch.setitem(timing.FLUSH_BYTES, "cuda", 1 << 20)  # read before each call
    monkeypatch.setattr(ceilings, "triton_readers", lambda memory: [])
    monkeypatch.setattr(command, "CEILING_SECONDS", 0.01)
    monkeypatch.setattr(command, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(command, "STEP_WORKLOAD", "host-10x256")


def test_from_start_to_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "select", shortened)
    with fake_gpu():
        cli.main(["gpu", "--out", str(tmp_path), "--memory", "0.01", "--without", "everyone"])
    report = Report.load(tmp_path / command.FILE)
    failed = [check for check in report.gpu["checks"] if check["outcome"] in ("failed", "timed out")]
    # No engine of ours has a kernel for this device, and that is what the build check is there to see.
    assert [check["name"] for check in failed] == ["build"], failed
    assert {"smoke", "tests", "compute-sanitizer"} <= {check["name"] for check in report.gpu["checks"]}
    assert report.environment["device"] == "Fake GPU"
    assert report.environment["multiprocessors"] == 132
    assert report.gpu["ceilings"]["read"] > 0
    rows = [row for row in report.rows if row.workload in WORKLOADS]
    assert {row.workload for row in rows} == WORKLOADS
    for row in rows:
        timed = {one.contender for one in row.contenders if one.p50_us and not one.failure}
        assert {TORCH_FOREACH, "fusedclip reference"} <= timed, row
    assert not report.wrong
    files = {path.name for path in tmp_path.iterdir()}
    assert {checks.LOG, command.FILE} <= files
    assert len(files) <= 8  # as many as are sure to be brought home
    assert "Fake GPU" in capfd.readouterr().out


def shortened(name: str, quick: bool) -> Suite:
    """Two of the suite's rows, with the one engine that serves any device among the contenders."""
    return replace(select(name, workloads=WORKLOADS), seconds_per_row=0.01, without=())


def test_a_device_by_its_number(tmp_path: Path) -> None:
    with fake_gpu():
        assert cli.main(["gpu", "--device", "cuda:0", "--out", str(tmp_path), "--only", "smoke"]) == 0


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="invalid device ordinal 3"):
        cli.main(["gpu", "--device", "cuda:3", "--out", str(tmp_path)])
