"""The experiment of optimizers in small: all of them learn alike, and table and picture say so."""

from pathlib import Path

import pytest
import torch

from benchmarks import environment
from benchmarks.results import Report
from benchmarks.train import optimizers


def test_all_optimizers_on_the_same_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"CONTEXT": 16, "BATCH": 2}.items():
        monkeypatch.setattr(optimizers, name, value)
    steps = []
    result = optimizers.optimizers(0, 20, lambda: steps.append(1))
    torchs, ours, in_bf16, split = result["runs"]
    assert len(steps) == 20
    assert ours["apart"] < 1e-4
    assert ours["apart"] < in_bf16["apart"] < 0.1
    assert split["apart"] < 0.5
    assert torchs["norms"][0] == pytest.approx(ours["norms"][0], rel=1e-5)  # before clipping
    assert "clip_ms" in torchs
    assert "clip_ms" not in ours
    assert [round(run["bytes_kept"]) for run in result["runs"]] == [12, 12, 8, 12]
    for run in result["runs"]:
        assert run["name"] in optimizers.summary(result)
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    report = Report(environment.describe(torch.device("cpu")), "train", 0, training={"optimizers": result})
    assert [path.name for path in plots.draw_all(report, tmp_path)] == ["optimizers.png"]
