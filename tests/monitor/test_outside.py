"""What others read: TensorBoard's own reader, Weights & Biases in offline mode, the picture, the command line."""

import builtins
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fusedclip.__main__ import main
from fusedclip.monitor import GradMonitor

STEPS = 40


def train(sinks: Any = (), steps: int = STEPS, max_norm: float = 2.0) -> GradMonitor:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    monitor = GradMonitor(model.named_parameters(), sinks=sinks)
    made = torch.Generator().manual_seed(0)
    for step in range(steps):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=made) * (10 if step == 25 else 0.1 + 0.05 * i)
        if step == 10:
            model[1].bias.grad.zero_()
            model[2].bias.grad.fill_(math.nan)
        monitor.clip_grad_norm_(max_norm)
    monitor.flush()
    return monitor


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        monitor = train(writer)
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    found, expected = read.Scalars("grad/norm"), monitor.history.records
    assert [event.step for event in found] == [record.step for record in expected]
    assert [event.value for event in found] == pytest.approx([one.norm for one in expected], rel=1e-6, nan_ok=True)
    assert {event.value for event in read.Scalars("grad/limit")} == {2.0}
    histograms = read.Histograms("grad/log10 of layer norms")
    assert len(histograms) == STEPS
    assert [int(one.histogram_value.num) for one in histograms] == [6 if step == 10 else 8 for step in range(STEPS)]


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="fusedclip", mode="offline", dir=str(tmp_path)) as run:
        monitor = train(run, steps=5)
        assert run.summary["grad/step"] == 4
        assert run.summary["grad/norm"] == pytest.approx(monitor.history.records[-1].norm)
        run.finish()
    (written,) = tmp_path.rglob("*.wandb")
    assert written.stat().st_size > 0


def test_anything_with_log_gets_one_call_for_each_record() -> None:
    run = mock.Mock(spec=["log"])
    monitor = train(run, steps=3)
    logged = [call.args[0] for call in run.log.call_args_list]
    assert [one["grad/step"] for one in logged] == [0, 1, 2]
    assert [one["grad/norm"] for one in logged] == [record.norm for record in monitor.history.records]


@pytest.mark.parametrize(
    "make",
    [
        train,
        lambda: train(steps=1),
        lambda: train(max_norm=math.inf),
        lambda: _of(0.0),
        lambda: _of(math.nan),
        lambda: _of(1.0, "a$b_{$"),
    ],
    ids=["usual", "one step", "never clipped", "zeros", "NaN", "a name that looks like a formula"],
)
def test_a_picture_is_drawn_of_any_run(make: Callable[[], GradMonitor], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make().plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError, match="the directory of"):
        make().plot(tmp_path / "none" / "run.png")


def _of(value: float, name: str = "a") -> GradMonitor:
    parameter = nn.Parameter(torch.zeros(3))
    monitor = GradMonitor({name: parameter})
    for _ in range(3):
        parameter.grad = torch.full((3,), value)
        monitor.clip_grad_norm_(1.0)
    return monitor


def test_a_picture_leaves_the_callers_backend_and_figures_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    try:
        pyplot.switch_backend("svg")
        _of(1.0).plot(tmp_path / "run.png")
        assert matplotlib.get_backend() == "svg"
        assert not pyplot.get_fignums()
    finally:
        pyplot.switch_backend(before)


def test_without_matplotlib_the_way_out_is_told(tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monitor = train(steps=3)
    with (
        mock.patch.object(builtins, "__import__", without),
        pytest.raises(ModuleNotFoundError, match=r"fusedclip\[plots\]"),
    ):
        monitor.plot(tmp_path / "run.png")


def test_the_report_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "run.jsonl", tmp_path / "run.png"
    train(path)

    def report(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fusedclip", "report", *arguments])
        return main()

    assert report(str(path), "--plot", str(picture)) == 0
    assert picture.exists()
    shown = capsys.readouterr().out
    for text in ("40 recorded, 0 to 39", "spikes      step 25", "not finite  step 10: 2.bias", "max_norm="):
        assert text in shown
    assert report(str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl" in capsys.readouterr().err
