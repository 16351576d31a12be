"""The floors: every loop goes through all of the memory, and leaves it as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import floors
from benchmarks.measure import one_after_another, readers
from benchmarks.results import Measurement

LINES = 8 * 4096
Loop = tuple[int, tuple[int, bool]]


@pytest.fixture
def words() -> torch.Tensor:
    return torch.arange(8 * LINES)


@pytest.mark.parametrize("loop", floors.LOOPS, ids=str)
def test_every_loop_goes_through_all_of_it(loop: Loop, words: torch.Tensor) -> None:
    streams, ahead = loop
    assert floors.go_through(words, streams, *ahead, stores=False) == words[::8].sum()
    floors.go_through(words, streams, *ahead, stores=True, key=5)
    assert torch.equal(words ^ 5, torch.arange(8 * LINES))


@pytest.mark.parametrize("stores", [False, True])
def test_timed_loops_leave_the_memory_as_it_is(stores: bool, words: torch.Tensor) -> None:
    entries = floors.loops(words.view(torch.uint8), stores)
    assert len(entries) == floors.FINALISTS
    for entry in entries:
        entry.call()
        assert entry.passes == 1 + stores
    assert torch.equal(words, torch.arange(8 * LINES))


def test_without_a_compiler_plain_sums_are_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_library", lambda: None)
    names = [entry.name for entry in readers(torch.zeros(64, dtype=torch.uint8))]
    assert names == ["read floor: sum of float32", "read floor: sum of int64"]


def test_two_passes_take_the_time_of_both() -> None:
    read = Measurement("read", p20_us=1.0, p50_us=2.0, p80_us=3.0, host_us=2.0, device_us=2.0, bytes_moved=4000)
    both = one_after_another(read, replace(read, contender="write", bytes_moved=8000))
    assert (both.contender, both.p20_us, both.p50_us, both.bytes_moved) == ("read; write", 2.0, 4.0, 12000)
    assert both.gb_per_s == pytest.approx(3.0)
