"""`benchmarks versus`: its verdict's arithmetic, and two real environments against each other."""

from __future__ import annotations

import json
import shutil
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import odd, versus
from benchmarks.cli import main
from benchmarks.environment import ROOT
from benchmarks.suites import Case, Operation
from benchmarks.versus import AGAIN, NEW, OLD, Ratio, Row, Times, Worker, verdict

QUIET = Ratio(1.0, 0.99, 1.01)


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (Ratio(1.05, 1.04, 1.06), QUIET, "SLOWER"),
        (Ratio(1.025, 1.02, 1.03), QUIET, "same"),  # the bar is 1.02 * 1.01
        (Ratio(1.05, 1.02, 1.08), QUIET, "undecided"),
        (Ratio(1.05, 1.04, 1.06), Ratio(1.05, 1.04, 1.06), "same"),
        (Ratio(1.05, 1.04, 1.06), Ratio(0.95, 0.94, 0.96), "same"),  # the noise may as well have been the other's
        (Ratio(0.9, 0.89, 0.91), QUIET, "faster"),
        (Ratio(0.99, 0.9, 1.0), QUIET, "undecided"),
    ],
)
def test_verdict(ratio: Ratio, noise: Ratio, expected: str) -> None:
    assert verdict(ratio, noise) == expected


def test_ratio_is_the_mean_over_starts_of_each_one_s_median() -> None:
    ratio = Ratio.of([[2.0, 2.0, 50.0], [6.0] * 5], [[1.0] * 3, [2.0] * 5])
    assert ratio.middle == 2.5
    assert ratio.low == 2.0  # both drawn starts may be the first


def test_the_interval_holds_the_truth_and_narrows_with_rounds() -> None:
    generator = np.random.default_rng(0)

    def times(factor: float, rounds: int) -> Times:
        return [list(factor * generator.lognormal(0, 0.1, rounds)) for _ in range(3)]

    few, many = (Ratio.of(times(1.1, rounds), times(1.0, rounds)) for rounds in (10, 1000))
    assert few.low < 1.1 < few.high
    assert many.low < 1.1 < many.high
    assert many.high - many.low < (few.high - few.low) / 3


def row(old: float, new: float, **plain: float) -> Row:
    each = {OLD: old, NEW: new, AGAIN: old}
    entries = {name: [[spent] * 7] for name, spent in plain.items()}
    times = {side: {"call": [[spent] * 7], **entries} for side, spent in each.items()}
    return Row(Case("one strided gradient", "float32", Operation.CLIPPED), dict.fromkeys(each, ""), times)


def test_a_failure_of_the_new_side_alone_does_not_hold() -> None:
    failing = {side: row(1.0, 1.0) for side in (OLD, NEW)}
    for side, one in failing.items():
        one.failures[side] = "norm off"
    assert [one.holds for one in failing.values()] == [True, False]
    assert failing[NEW].verdict == "FAILED, new: norm off"
    assert "norm off" in versus.table(list(failing.values()))


def test_an_odd_row_stands_beside_the_plain_call_less_the_odd_gradient_s_own_cost() -> None:
    assert row(30.0, 14.0, plain=10.0, alone=2.0).of_plain(NEW) == pytest.approx(1.2)
    assert "1.20x" in versus.table([row(30.0, 14.0, plain=10.0, alone=2.0)])


def environment(folder: Path, change: str = "") -> Path:
    """An environment that holds this checkout's fusedclip, with a change at its end, beside all else of this one."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    shutil.copytree(ROOT / "fusedclip", packages / "fusedclip")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    with (packages / "fusedclip" / "__init__.py").open("a") as package:
        package.write(change)
    return folder / "bin" / "python"


SLOW = """
def clip_grad_norm_(*arguments, _clip=clip_grad_norm_, **options):
    __import__("time").sleep(0.002)
    return _clip(*arguments, **options)
"""
SMALL = ["--suite", "claims", "--workload", "host-30x8", "--seconds", "0.5", "--starts", "2"]


def test_a_version_is_no_slower_than_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # would show the workers the checkout
    python, out = environment(tmp_path / "one"), tmp_path / "result.json"
    assert main(["versus", str(python), str(python), *SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    result = json.loads(out.read_text())["versus"]
    assert all(one["file"].startswith(str(tmp_path / "one")) for one in result["sides"].values())
    assert all(f"{side}: fusedclip" in said for side in (OLD, NEW, AGAIN))
    (found,) = result["rows"]
    assert found["ratio"]["low"] < 1.02 * max(found["noise"]["high"], 1 / found["noise"]["low"])
    assert [len(times["call"]) for times in found["times"].values()] == [2, 2, 2]


def test_a_slower_version_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = environment(tmp_path / "old"), environment(tmp_path / "new", SLOW)
    assert main(["versus", str(old), str(new), *SMALL]) == 1
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize("name", odd.ODD)
def test_odd_cases_clip_where_they_are_said_to(name: str) -> None:
    for case in odd.SUITE.cases:
        if case.workload == name:
            for one in odd.entries(case, torch.device("cpu"), seed=0):
                parameters = [parameter for parameter in one.call.args[0] if parameter.grad is not None]  # type: ignore[attr-defined]
                one.before()
                before = [parameter.grad.clone() for parameter in parameters]
                one.call()
                kept = [torch.equal(parameter.grad, old) for parameter, old in zip(parameters, before, strict=True)]
                assert set(kept) == {not case.operation.writes}, one.name


def test_one_fusedclip_in_both_environments_is_refused() -> None:
    workers = {}
    for side, python in {OLD: "a", NEW: "b", AGAIN: "a"}.items():
        workers[side] = worker = object.__new__(Worker)
        worker.python, worker.package = Path(python), {"file": "/somewhere/fusedclip/__init__.py"}
    with pytest.raises(ValueError, match="both environments have one fusedclip"):
        versus.check(workers)
    workers[NEW].package = {"file": str(ROOT / "fusedclip" / "__init__.py")}
    with pytest.raises(ValueError, match="new is this checkout"):
        versus.check(workers)
