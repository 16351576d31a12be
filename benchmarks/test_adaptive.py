"""The adaptive experiment in small: every contender meets the garbage, and table and picture say what came of it."""

from pathlib import Path

import pytest
import torch

from benchmarks import environment
from benchmarks.results import Report
from benchmarks.train import adaptive


@pytest.mark.filterwarnings("ignore:SkipSpikes has left out")
def test_all_contenders_meet_the_garbage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"CONTEXT": 16, "WIDTH": 16, "LAYERS": 1, "BATCH": 2}.items():
        monkeypatch.setattr(adaptive, name, value)
    steps = []
    result = adaptive.adaptive(0, 70, lambda: steps.append(1))
    runs = {run["name"]: run for run in result["runs"]}
    assert list(runs) == ["no garbage", "not clipped", "fixed", "AutoClip", "ZClip", "AdaGC", "SkipSpikes"]
    assert len(steps) == 70
    assert runs["SkipSpikes"]["skipped"] >= 3
    assert runs["not clipped"]["clipped"] == 0
    first = result["spikes"][0]
    for name, run in runs.items():
        assert len(run["losses"]) == 70
        assert (run["norms"][first] > 5 * run["norms"][first - 1]) == (name != "no garbage")
    assert runs["fixed"]["losses"][:first] == runs["no garbage"]["losses"][:first]
    assert runs["no garbage"]["cost"] == 0
    for name in runs:
        assert name in adaptive.summary(result)
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    report = Report(environment.describe(torch.device("cpu")), "train", 0, training={"adaptive": result})
    assert [path.name for path in plots.draw_all(report, tmp_path)] == ["adaptive.png"]
