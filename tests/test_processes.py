"""Other processes, forked or spawned after the import, and copies of what carries a state from one to the other."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedclip
from fusedclip import adaptive
from fusedclip.monitor import GradMonitor

from .conftest import parameters

LARGE = 1 << 20  # elements: more than one thread's worth


def filled(count: int = LARGE) -> list[Tensor]:
    return parameters([torch.full((count,), 0.5), torch.full((10,), -2.0)])


def _clip_there(answers: Connection) -> None:
    torch.set_num_threads(1)  # GUARANTEES.md: a forked child has none of the threads that torch had
    params = filled()
    norm = fusedclip.clip_grad_norm_(params, 1.0)
    answers.send((norm.item(), params[1].grad.tolist()))  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_child_clips_as_its_parent(start: str) -> None:
    params = filled()
    norm = fusedclip.clip_grad_norm_(params, 1.0)  # all threads of the parent have worked by now
    context: Any = multiprocessing.get_context(start)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_clip_there, args=(there,))
    child.start()
    assert here.poll(60), f"the child did not answer; its exit code is {child.exitcode}"
    assert here.recv() == (norm.item(), params[1].grad.tolist())  # type: ignore[union-attr]
    child.join()
    assert child.exitcode == 0


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
RULES: list[Callable[[], adaptive.AdaptiveRule]] = [
    lambda: adaptive.AutoClip(window=3),
    adaptive.ZClip,
    adaptive.AdaGC,
    lambda: adaptive.EMAClip(1.1),
    adaptive.SkipSpikes,
]


@COPIES
@pytest.mark.parametrize("build", RULES)
def test_a_copied_rule_goes_on_by_itself(
    build: Callable[[], adaptive.AdaptiveRule], copied: Callable[[Any], Any]
) -> None:
    rule = build()
    for _ in range(4):
        rule.clip_(filled(20))
    other = copied(rule)
    first, second = filled(20), filled(20)
    assert rule.clip_(first) == other.clip_(second)
    for a, b in zip(first, second, strict=True):
        assert a.grad is not None
        assert a.grad.equal(b.grad)  # type: ignore[arg-type]
    before = rule.state_dict()
    other.clip_(filled(20))
    torch.testing.assert_close(rule.state_dict()["state"], before["state"], equal_nan=True, rtol=0, atol=0)
    assert repr(other) == repr(rule)


@COPIES
def test_a_copied_scaler_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    scaler = fusedclip.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    other = copied(scaler)
    for one in (scaler, other):
        params = filled(20)
        one.scale(torch.ones(()))
        norm = one.unscale_and_clip_grad_norm_(torch.optim.SGD(params), 0.5)
        torch.testing.assert_close(norm, torch.tensor(45.0).sqrt() / 8)
    assert other.state_dict() == scaler.state_dict()


@COPIES
def test_a_copied_monitor_has_the_records_and_no_sinks(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    params = filled(20)
    path = tmp_path / "run.jsonl"
    with GradMonitor({"large": params[0], "small": params[1]}, sinks=[path]) as monitor:
        monitor.clip_grad_norm_(1.0)
        other = copied(monitor)
        other.clip_grad_norm_(1.0)
        other.close()
        assert (other.step, monitor.step) == (2, 1)
        monitor.clip_grad_norm_(1.0)
        assert (other.summary().steps, monitor.summary().steps) == (2, 2)
    assert len(path.read_text().splitlines()) == 3  # the header and this monitor's two steps


@COPIES
def test_statistics_are_copied(copied: Callable[[Any], Any]) -> None:
    stats = fusedclip.clip_grad_norm_with_stats_(filled(20), 1.0)
    assert copied(stats).norm.equal(stats.norm)
    assert copied(stats).total.zeros.equal(stats.total.zeros)
