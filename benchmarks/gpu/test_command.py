"""The stages of the GPU command, on the CPU; what only a GPU can do is replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import cli, optimizer_step
from benchmarks.contenders import TORCH_FOREACH, torch_contender
from benchmarks.gpu import ceilings, checks, command, foreach, sources, tables
from benchmarks.gpu.checks import Check
from benchmarks.operations import Operation
from benchmarks.results import Report
from benchmarks.suites import Case, Suite

CPU = torch.device("cpu")


def small_plan(told: Callable[[str], object] = lambda what: None) -> command.Plan:
    suite = Suite((Case("host-10x8", "float32", Operation.NOT_CLIPPED),), seconds_per_row=0.02)
    return command.Plan(CPU, suite, suite, 0, 1 << 20, 100.0, told)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU can do is left out, and everything is short."""
    measure = ceilings.measure
    monkeypatch.setattr(ceilings, "measure", lambda device, seconds, seed: measure(device, 0.01, seed, 1 << 16))
    monkeypatch.setattr(foreach, "launch_capacity", lambda device: 110)
    monkeypatch.setattr(checks, "tests", lambda: checks.run("tests", [sys.executable, "-c", ""], 60, {}))
    monkeypatch.setattr(checks, "sanitizers", lambda: iter([Check("compute-sanitizer memcheck", "left out")]))
    monkeypatch.setattr(optimizer_step, "measure", lambda device, seconds, seed, workload: [])
    monkeypatch.setattr(command, "line_up", lambda device, compiled: [torch_contender(TORCH_FOREACH, foreach=True)])


@pytest.mark.usefixtures("on_the_cpu")
def test_all_stages_into_one_file(tmp_path: Path) -> None:
    heard: list[str] = []
    report = command.run(small_plan(heard.append), tmp_path)
    again = Report.load(tmp_path / command.FILE)
    assert again == report
    assert [name for name in heard if name in command.STAGES] == list(command.STAGES)
    assert [check["outcome"] for check in again.gpu["checks"]] == ["passed", "passed", "left out"]
    assert again.gpu["ceilings"]["read"] > 0 < again.gpu["ceilings"]["copy"]
    assert again.gpu["sources"] == sources.hashes()
    assert len(again.rows) == len(again.gpu["compiled"]) == 1
    assert not command.failed(again)
    content = json.loads((tmp_path / command.FILE).read_text())
    assert {"date", "device", "claims", "rows", "versions", "commit"} <= content.keys()
    assert "110 tensors in one launch" in tables.machine(again)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, seconds: float, seed: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ceilings, "measure", broken)
    report = command.run(small_plan(), tmp_path, without=["steps"])
    assert {"name": "ceilings", "outcome": "failed", "seconds": 0.0, "told": "RuntimeError: out of memory"} in (
        report.gpu["checks"]
    )
    assert len(report.rows) == 1
    assert command.failed(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "there is no GPU here that torch can use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.main(["gpu", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "not cpu" in capsys.readouterr().err
