"""The command that tunes: wrong candidates drop out, only gains beyond the noise are written, other rows stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import tune
from benchmarks.contenders import Contender
from benchmarks.environment import ROOT
from benchmarks.measure import Settings
from benchmarks.results import Measurement
from benchmarks.suites import Operation
from fusedclip.backends.triton import tuning
from fusedclip.backends.triton.tuning import INTERPRETER, Row, Tuning

pytest.importorskip("triton")
CPU = torch.device("cpu")
WRONG, FAST = (replace(INTERPRETER, programs_per_processor=n) for n in (7, 8))


def fake_engine(seconds: dict[Tuning, float]) -> Contender:
    """Clips right, unless it runs as WRONG does, in these seconds."""

    @torch.no_grad()
    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        running = tuning.forced.get()
        assert running is not None
        time.sleep(seconds.get(running, 0.004))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm: Tensor = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
        for gradient in gradients:
            gradient.copy_(gradient.double() * (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm * (2 if running == WRONG else 1)

    return Contender("fusedclip fake", {Operation.NOT_CLIPPED: clip, Operation.CLIPPED: clip})


def tuned(monkeypatch: pytest.MonkeyPatch, seconds: dict[Tuning, float]) -> tune.Result:
    monkeypatch.setattr(tune, "fusedclip_contender", lambda name: fake_engine(seconds))
    monkeypatch.setitem(tune.SECONDS, "cpu", 0.05)
    return tune.tune("float32", Settings(CPU, ()), False, list(seconds), lambda: None)


def test_the_fastest_right_candidate_gets_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, {WRONG: 0.0, FAST: 0.001})
    assert result.row is not None
    assert result.row.key == ("interpreter", "float32")
    assert result.row.tuning == FAST
    assert result.row.gain > 1.5
    (wrong,) = [one for one in result.candidates if one.failure]
    assert wrong.tuning == WRONG
    lines = tune.table(result).splitlines()
    assert "FAILED, norm off" in lines[-1]
    assert tune.name_of(FAST) in lines[2]
    assert sum("(default)" in line for line in lines) == 1
    assert "gained" in result.verdict


@pytest.mark.parametrize("seconds", [{FAST: 0.008}, {WRONG: 0.0}])
def test_what_gains_nothing_gets_no_row(monkeypatch: pytest.MonkeyPatch, seconds: dict[Tuning, float]) -> None:
    monkeypatch.setattr(tune, "LEAST_GAIN", 1.5)  # a busy machine's noise is not the test's concern
    result = tuned(monkeypatch, seconds)
    assert result.row is None
    assert "no row, nothing gained" in result.verdict


def test_a_wrong_default_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETER", WRONG)
    result = tuned(monkeypatch, {FAST: 0.001})
    assert result.candidates[0].failure
    assert result.row is None
    assert "the default is wrong: norm off" in result.verdict
    assert "(default): FAILED" in tune.table(result)


def test_rows_of_what_was_not_measured_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    stale = Row("interpreter", "float32", FAST, 1.1, "d", "3.9.0", "2026-01-31")
    others = [replace(stale, dtype="float16"), replace(stale, architecture="sm_90")]
    tuning.write_rows(path, [stale, *others])
    right, wrong = (tune.Candidate(INTERPRETER, Measurement("", failure), Measurement("")) for failure in ("", "off"))
    result = tune.Result(stale.key, [right], None, "")
    tune.write(path, [stale, *others], [result])
    assert tuning.read_rows(path) == others
    tune.write(path, [stale, *others], [result._replace(candidates=[wrong])])
    assert set(tuning.read_rows(path)) == {stale, *others}
    tune.write(path, others, [result._replace(row=stale)])
    assert set(tuning.read_rows(path)) == {stale, *others}
    tune.write(tmp_path / "deeper" / "tuning.json", [], [result._replace(row=stale)])
    assert tuning.read_rows(tmp_path / "deeper" / "tuning.json") == [stale]


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_candidates_fit_and_leave_room_in_the_cache(monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
    from fusedclip.backends.triton.tables import CACHED

    monkeypatch.setattr(torch.version, "hip", hip)
    device = torch.device("cuda", 0)
    found = tune.tunings(device, [FAST])
    assert found[:2] == [tuning.default_for(device), FAST]
    assert len(set(found)) == len(found) < CACHED  # or tables would be made anew while the clock runs
    assert 2 < len(tune.tunings(device, quick=True)) < len(found) / 2
    for one in found[2:]:
        registers = dict(one.limits).get("maxnreg", 0) * 32 * one.num_warps * one.programs_per_processor
        assert (0 < registers <= 65536) if hip is None else not one.limits


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    run = [sys.executable, "-m", "benchmarks", "tune", *arguments]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_in_the_interpreter(tmp_path: Path) -> None:
    out, dtypes = tmp_path / "rows.json", ("bfloat16", "float32")
    other = Row("sm_90", "float32", FAST, 1.1, "d", "3.9.0", "2026-01-31")
    tuning.write_rows(out, [other, replace(other, architecture="interpreter", gain=1e9)])
    done = command("--quick", "--out", str(out), *(f"--dtype={dtype}" for dtype in dtypes), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count("(default)") == 2
    *rows, kept = tuning.read_rows(out)
    assert kept == other
    gained = [dtype for dtype in dtypes if f"{dtype}: no row" not in done.stdout]
    assert [(row.architecture, row.dtype) for row in rows] == [("interpreter", dtype) for dtype in gained]
    assert all(tune.LEAST_GAIN < row.gain < 1e3 for row in rows)


def test_the_command_refuses_what_it_cannot_measure() -> None:
    done = command()
    assert done.returncode == 2
    assert "cannot be tuned on cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    done = command("--device", "cuda", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "reads the CPU's memory" in done.stderr
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "--out" in done.stderr
