"""The stages of the GPU command, on the CPU; what only a GPU can do is replaced."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cli, measure, optimizer_step
from benchmarks.contenders import TORCH_FOREACH, fusedclip_contender, torch_contender
from benchmarks.gpu import ceilings, command
from benchmarks.gpu.command import STAGES
from benchmarks.gradients import Gradients
from benchmarks.measure import Settings
from benchmarks.release import checks, sources
from benchmarks.release.checks import Check, Task
from benchmarks.results import Report
from benchmarks.suites import Case, Operation, Suite

CPU = torch.device("cpu")


SMALL = {
    "gpu": Suite((Case("host-10x8", "float32", Operation.NOT_CLIPPED),), seconds_per_row=0.02),
    "gpu-everyone": Suite((Case("host-10x256", "mixed", Operation.CLIPPED),), seconds_per_row=0.02),
}


def run_all(folder: Path, *stages: str, minutes: float = 5, progress: command.Progress = lambda what: None) -> Report:
    return command.Run(Settings(CPU, memory=1 << 20), False, folder, minutes, progress).all(stages or STAGES)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU can do is left out, and everything is short."""
    measure, nothing = ceilings.measure, [sys.executable, "-c", ""]
    monkeypatch.setattr(ceilings, "measure", lambda device, seconds, seed: measure(device, 0.01, seed, 1 << 16))
    monkeypatch.setattr(checks, "smoke", lambda: Task("smoke", nothing, 60.0, {}))
    monkeypatch.setattr(checks, "tests", lambda: Task("tests", nothing, 60.0, {}))
    monkeypatch.setattr(checks, "sanitizers", lambda: [Check("compute-sanitizer", "left out")])
    monkeypatch.setattr(optimizer_step, "measure", lambda settings, seconds, workload: [])
    contenders = [torch_contender(TORCH_FOREACH, foreach=True), fusedclip_contender("cpu")]
    monkeypatch.setattr(command, "line_up", lambda device, compiled: contenders)
    monkeypatch.setattr(command, "select", lambda name, quick: SMALL[name])


@pytest.mark.usefixtures("on_the_cpu")
def test_all_stages_into_one_file(tmp_path: Path) -> None:
    heard: list[str] = []
    report = run_all(tmp_path, progress=heard.append)
    again = Report.load(tmp_path / command.FILE)
    assert again == report
    assert list(dict.fromkeys(name for name in heard if name in STAGES)) == list(STAGES)
    outcomes = {check["name"]: check["outcome"] for check in again.gpu["checks"]}
    passed = dict.fromkeys(("build", "smoke", "tests"), "passed")
    assert outcomes == passed | {"compute-sanitizer": "left out"}
    assert again.gpu["ceilings"]["read"] > 0 < again.gpu["ceilings"]["copy"]
    assert again.gpu["sources"] == sources.hashes()
    assert [row.workload for row in again.rows] == ["host-10x8", "host-10x256"]
    assert not command.failed(again)
    content = json.loads((tmp_path / command.FILE).read_text())
    assert {"date", "device", "claims", "rows", "versions", "commit"} <= content.keys()
    assert "promised, and not measured: norm pass" in command.machine(again)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, seconds: float, seed: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ceilings, "measure", broken)
    report = run_all(tmp_path, "ceilings", "rows")
    (check,) = report.gpu["checks"]
    assert (check["name"], check["outcome"]) == ("ceilings", "failed")
    assert "RuntimeError: out of memory" in check["output"]
    assert "broken" in check["output"]  # where it happened
    assert len(report.rows) == 1
    assert command.failed(report)


@pytest.mark.usefixtures("on_the_cpu")
def test_rows_are_on_disk_before_the_next_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = tuple(Case(name, "float32", Operation.CLIPPED) for name in ("host-10x8", "host-30x8", "host-100x8"))
    monkeypatch.setitem(SMALL, "gpu", Suite(cases, 0.02))
    make = measure.gradients_like

    def fails_once(name: str, dtype: str, settings: Settings) -> Gradients:
        if name == "host-30x8":
            on_disk = Report.load(tmp_path / command.FILE)
            assert [row.workload for row in on_disk.rows] == ["host-10x8"]
            raise RuntimeError("out of memory")
        return make(name, dtype, settings)

    monkeypatch.setattr(measure, "gradients_like", fails_once)
    report = run_all(tmp_path, "rows")
    assert [row.workload for row in report.rows] == ["host-10x8", "host-100x8"]
    (check,) = report.gpu["checks"]
    assert check["name"].startswith("host-30x8")
    assert "out of memory" in check["output"]


@pytest.mark.usefixtures("on_the_cpu")
def test_an_engine_that_fails_its_smoke_test_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "smoke", lambda: Task("smoke", [sys.executable, "-c", "raise SystemExit(1)"], 60.0, {}))
    contenders = [torch_contender(TORCH_FOREACH, foreach=True), torch_contender("fusedclip cuda", foreach=True)]
    monkeypatch.setattr(command, "line_up", lambda device, compiled: contenders)
    report = run_all(tmp_path, "smoke", "rows")
    assert [one.contender for one in report.rows[0].contenders] == [TORCH_FOREACH]
    assert command.failed(report)


@pytest.mark.usefixtures("on_the_cpu")
def test_nothing_is_begun_when_time_is_up(tmp_path: Path) -> None:
    report = run_all(tmp_path, "rows", "tests", minutes=0)
    assert [check["outcome"] for check in report.gpu["checks"]] == ["left out", "left out"]
    assert not report.rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "there is no GPU here that torch can use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.main(["gpu", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "not cpu" in capsys.readouterr().err
