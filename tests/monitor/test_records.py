"""What a monitor records is what the gradients were, and recording changes nothing of the clipping."""

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedclip
from fusedclip import adaptive
from fusedclip.monitor import GradMonitor, History, Record

from ..conftest import Engine
from ..host_reads import host_reads

SHAPES = {"embed.weight": (6, 4), "norm.bias": (4,), "scale": (), "head.weight": (3, 4)}


def model(engine: Engine) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape, device=engine.device)) for name, shape in SHAPES.items()}


def fill(parameters: dict[str, nn.Parameter], engine: Engine, seed: int = 0, size: float = 1.0) -> None:
    for i, parameter in enumerate(parameters.values()):
        made = engine.randn(max(parameter.numel(), 1), seed=10 * seed + i) * size
        parameter.grad = made.view(parameter.shape)


def test_a_record_is_what_the_gradients_were(engine: Engine) -> None:
    parameters, records = model(engine), list[Record]()
    monitor = GradMonitor(parameters.items(), sinks=[records.append])
    fill(parameters, engine)
    parameters["embed.weight"].grad[2] = 0  # type: ignore[index]
    parameters["norm.bias"].grad = None
    before = copy.deepcopy([parameter.grad for parameter in parameters.values()])
    others = model(engine)
    for other, grad in zip(others.values(), before, strict=True):
        other.grad = None if grad is None else grad.clone()
    norm = monitor.clip_grad_norm_(0.5)
    expected = fusedclip.clip_grad_norm_(others.values(), 0.5)
    assert engine.same(norm, expected)
    for parameter, other in zip(parameters.values(), others.values(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=0)
    assert not records  # a step later
    monitor.flush()
    (record,) = records
    grads = [grad for grad in before if grad is not None]
    assert (record.step, record.limit, record.clipped, record.nonfinite) == (0, 0.5, True, ())
    assert record.norm == pytest.approx(float(expected), rel=1e-6)
    assert record.coef == pytest.approx(0.5 / (float(expected) + 1e-6), rel=1e-6)
    assert record.zeros == sum(int((grad == 0).sum()) for grad in grads)
    assert record.largest == max(float(grad.abs().max()) for grad in grads)
    assert record.layers is not None
    assert record.layers[1] is None
    layers = [float(norm) for norm in record.layers if norm is not None]
    assert layers == pytest.approx([float(grad.norm()) for grad in grads], rel=1e-6)


@pytest.mark.parametrize("make", [adaptive.AutoClip, adaptive.AdaGC, lambda: adaptive.EMAClip(0.9)])
def test_adaptive_rules_do_here_what_they_do_elsewhere(engine: Engine, make: object) -> None:
    assert callable(make)
    rule, other, parameters, others = make(), make(), model(engine), model(engine)
    monitor = GradMonitor(parameters, every=2)
    for step in range(5):
        fill(parameters, engine, step, 1 + step)
        fill(others, engine, step, 1 + step)
        norm = monitor.clip_grad_norm_(rule)
        assert engine.same(norm, other.clip_(others.values()))
        for one, two in zip(parameters.values(), others.values(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=0)
    monitor.flush()
    assert [record.step for record in monitor.history.records] == [0, 2, 4]
    assert (monitor.history.records[0].limit is None) == (not isinstance(rule, adaptive.AutoClip))
    for name, value in other.state_dict()["state"].items():
        torch.testing.assert_close(rule.state_dict()["state"][name], value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", [1.0, 3.0, math.inf, 0.0])
def test_norms_of_other_orders(engine: Engine, p: float) -> None:
    parameters = model(engine)
    monitor = GradMonitor(parameters)
    fill(parameters, engine)
    grads = [parameter.grad.clone() for parameter in parameters.values() if parameter.grad is not None]
    monitor.clip_grad_norm_(0.5, p)
    monitor.flush()
    assert monitor.history.records[0].norm == pytest.approx(float(fusedclip.get_total_norm(grads, p)), rel=1e-6)
    expected = [float(norm) for norm in fusedclip.get_per_tensor_norms(grads, p)]
    assert list(monitor.history.layers[0]) == pytest.approx(expected, rel=1e-6)


def test_a_norm_that_is_not_finite_names_where_it_began(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    parameters, logger = model(engine), logging.getLogger("run")
    monitor = GradMonitor(parameters, sinks=logger)
    caplog.set_level(logging.INFO, "run")
    for step in range(3):
        fill(parameters, engine, step)
        if step == 1:
            parameters["scale"].grad.fill_(math.nan)  # type: ignore[union-attr]
            parameters["head.weight"].grad[0, 0] = math.inf  # type: ignore[index]
        monitor.clip_grad_norm_(100.0)
    monitor.flush()
    warned = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert [one.getMessage() for one in warned] == [
        "step 1: the gradient norm is nan; not finite are scale, head.weight"
    ]
    assert len(caplog.records) == 3
    assert monitor.summary().nonfinite == [(1, ("scale", "head.weight"))]


def test_nothing_is_read_but_what_has_arrived() -> None:
    """On a GPU the row of the step before; the engine of the CPU reads its own coefficients."""
    engine = Engine("reference", "cpu")
    parameters = model(engine)
    with fusedclip.backends.use("reference"):
        monitor = GradMonitor(parameters)
        for step in range(3):
            fill(parameters, engine, step)
            with host_reads() as seen:
                monitor.clip_grad_norm_(math.inf)
            rows = seen.count("tolist")
            with host_reads() as plain:
                fusedclip.clip_grad_norm_(parameters.values(), math.inf)
            assert rows == (step > 0) + plain.count("tolist")
            assert seen.count("item") == plain.count("item")


def test_a_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    engine, path = Engine("cpu", "cpu"), tmp_path / "run.jsonl"
    parameters = model(engine)
    with GradMonitor(parameters, sinks=str(path)) as monitor:
        for step in range(30):
            fill(parameters, engine, step, math.inf if step == 7 else 1.0)
            monitor.clip_grad_norm_(3.0)
    again = History.read(path)
    assert again.names == list(SHAPES)
    assert str(again.records) == str(monitor.history.records)  # NaN included
    assert str(again.layers) == str(monitor.history.layers)
    assert str(again.summary()) == str(monitor.summary())
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    path.write_text(path.read_text()[:-20])  # a run that was stopped
    assert len(History.read(path).records) == 29
    with GradMonitor(parameters, sinks=path) as resumed:
        resumed.load_state_dict({"step": 25, "names": list(SHAPES)})
        for step in range(25, 40):
            fill(parameters, engine, step, 2.0)
            resumed.clip_grad_norm_(3.0)
    again = History.read(path)
    assert [record.step for record in again.records] == again.layer_steps == list(range(40))
    assert str(again.records[25:]) == str(resumed.history.records)
    assert str(again.layers[25:]) == str(resumed.history.layers)


def test_a_run_stopped_at_its_header_goes_on(tmp_path: Path) -> None:
    engine, path = Engine("cpu", "cpu"), tmp_path / "run.jsonl"
    parameters = model(engine)
    path.write_text('{"fusedclip": "moni')
    with GradMonitor(parameters, sinks=path) as monitor:
        fill(parameters, engine)
        monitor.clip_grad_norm_()
    assert len(History.read(path).records) == 1


def test_a_file_is_closed_even_if_a_sink_raises(tmp_path: Path) -> None:
    engine = Engine("cpu", "cpu")
    parameters = model(engine)
    fill(parameters, engine)

    def full(record: Record) -> None:
        raise OSError("disk full")

    monitor = GradMonitor(parameters, sinks=[tmp_path / "run.jsonl", full])
    monitor.clip_grad_norm_(1.0)
    with pytest.raises(OSError, match="disk full"):
        monitor.close()
    assert monitor._sinks[0]._file.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, -1.0, math.inf, -math.inf])
def test_what_is_not_finite_is_named_whatever_the_order(engine: Engine, p: float) -> None:
    parameters = model(engine)
    fill(parameters, engine)
    parameters["embed.weight"].grad[0, 0] = math.inf  # type: ignore[index]
    parameters["scale"].grad.fill_(math.nan)  # type: ignore[union-attr]
    monitor = GradMonitor(parameters)
    monitor.clip_grad_norm_(math.inf, p)
    monitor.flush()
    assert monitor.history.records[0].nonfinite == ("embed.weight", "scale")


def test_finite_gradients_are_not_named_though_their_squares_overflow() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.full((2,), 1e200, dtype=torch.float64)
    monitor = GradMonitor({"a": parameter})
    monitor.clip_grad_norm_()
    monitor.flush()
    assert (monitor.history.records[0].norm, monitor.history.records[0].nonfinite) == (math.inf, ())


def test_zeros_of_a_parameter_with_two_names_count_once() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 0.0])
    monitor = GradMonitor({"a": parameter, "b": parameter})
    monitor.clip_grad_norm_()
    monitor.flush()
    assert monitor.history.records[0].zeros == 2
    assert monitor.history.layers == [(3.0, 3.0)]


def test_long_runs_keep_their_layers_thinned_out() -> None:
    history = History(["a"])
    for step in range(10_000):
        history.add(Record(step, 1.0, None, 1.0, 0, 1.0, (), (1.0,)))
    assert len(history.records) == 10_000
    assert 1000 <= len(history.layers) <= 2048
    gaps = {b - a for a, b in zip(history.layer_steps, history.layer_steps[1:], strict=False)}
    assert gaps == {8}


def run(norms: list[float], limit: float = 1.0, layers: list[tuple[float | None, ...]] | None = None) -> History:
    history = History(["a.weight", "b.weight"])
    for step, norm in enumerate(norms):
        coef = min(1.0, limit / norm) if norm else 1.0
        history.add(Record(step, norm, limit, coef, 0, 1.0, (), layers[step] if layers else (norm, norm)))
    return history


def test_the_summary_and_the_suggestion_say_what_happened() -> None:
    norms = [2.0 + 0.01 * (step % 100) for step in range(400)]
    norms[250] = 60.0
    layers: list[tuple[float | None, ...]] = [(0.0 if step > 250 else 1.0, None) for step in range(400)]
    history = run(norms, limit=2.5, layers=layers)
    summary = history.summary()
    assert summary.spikes == [(250, 60.0)]
    assert summary.vanished == ["a.weight"]
    assert summary.absent == ["b.weight"]
    assert summary.clipped == pytest.approx(sum(norm > 2.5 for norm in norms) / 400)
    assert summary.percentiles[50] == pytest.approx(2.495, abs=0.01)
    suggestion = history.suggest_max_norm(0.1)
    late = [norm for norm in norms[200:] if norm < 50]
    assert sum(norm > suggestion.max_norm for norm in late) / len(late) == pytest.approx(0.1, abs=0.015)
    assert "1 spike was left out" in suggestion.reason
    assert "the present limit, 2.5, clipped 49%" in suggestion.reason or "clipped 50%" in suggestion.reason
    assert (
        "would have clipped 10% of the last 10" in run([1.0 + step for step in range(20)]).suggest_max_norm(0.01).reason
    )
    assert "would have clipped 0% of the last 10" in run([2.0] * 20).suggest_max_norm().reason
    with pytest.raises(ValueError, match="10 of the last 10 usual steps have a norm of 0"):
        run([0.0] * 20).suggest_max_norm()
    falling = run([10 * math.exp(-step / 100) for step in range(400)])
    assert "ask again later" in falling.suggest_max_norm().reason


def test_bad_input(tmp_path: Path) -> None:
    engine = Engine("cpu", "cpu")
    parameters = model(engine)
    cases = [
        (lambda: GradMonitor(parameters, sinks=tmp_path / "no" / "run.jsonl"), FileNotFoundError, "of the sink"),
        (lambda: GradMonitor(parameters, sinks="run.txt"), ValueError, r"must end in .jsonl, got 'run.txt'"),
        (lambda: GradMonitor(parameters, sinks=3), TypeError, "a sink is a path"),
        (lambda: GradMonitor(parameters, every=0), ValueError, "every must be a whole number of steps"),
        (lambda: GradMonitor(parameters.values()), TypeError, r"as model.named_parameters\(\) gives"),
        (lambda: GradMonitor([]), ValueError, "no parameter to monitor"),
        (lambda: GradMonitor([("a", parameters["scale"])] * 2), ValueError, "two parameters are called 'a'"),
        (lambda: GradMonitor(parameters).suggest_max_norm(), ValueError, "needs 20 steps"),
        (lambda: GradMonitor(parameters).suggest_max_norm(1.5), ValueError, "clip_rate is 1.5"),
        (lambda: GradMonitor(parameters).summary(), ValueError, "nothing has been recorded yet"),
        (lambda: GradMonitor(parameters).clip_grad_norm_(-1.0), ValueError, "max_norm is -1"),
        (lambda: GradMonitor(parameters).clip_grad_norm_(adaptive.SkipSpikes()), ValueError, "which a monitor cannot"),
        (lambda: GradMonitor(parameters).load_state_dict({}), ValueError, "takes what its state_dict returned"),
    ]  # fmt: skip
    for make, error, says in cases:
        with pytest.raises(error, match=says):
            make()  # type: ignore[no-untyped-call]


def test_a_renamed_parameter_is_told() -> None:
    engine = Engine("cpu", "cpu")
    saved = GradMonitor(model(engine))
    saved.step = 12
    other = GradMonitor({name.replace("head", "out"): parameter for name, parameter in model(engine).items()})
    with pytest.raises(ValueError, match=r"'head.weight' is not there any more and 'out.weight' was not there then"):
        other.load_state_dict(saved.state_dict())
    again = GradMonitor(model(engine))
    again.load_state_dict(saved.state_dict())
    assert again.step == 12


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for text, says in (("", "has no records"), ("hello\n", "line 1: no record"), ('{"a": 1}\n', "no records")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            History.read(path)
    header = '{"fusedclip": "monitor", "parameters": ["%s"], "sizes": [1]}\n'
    path.write_text(header % "a" + header % "b")
    with pytest.raises(ValueError, match="line 2: a run with other parameters begins here"):
        History.read(path)
    good = Record(0, 1.0, 1.0, 1.0, 0, 1.0, (), (1.0,)).as_json()
    for bad in (good.replace("[1.0]", "[]"), good.replace('"norm": 1.0', '"norm": "x"'), "7", "", "[]"):
        path.write_text(f"{header % 'a'}{good}\n{bad}\n{good}\n")
        with pytest.raises(ValueError, match=r"run.jsonl, line 3: no record of a GradMonitor"):
            History.read(path)
