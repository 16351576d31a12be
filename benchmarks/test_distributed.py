"""The distributed benchmark: what it counts, its model on paper, and its tables."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.distributed import command, model
from benchmarks.distributed.contenders import CLIPS, FLOOR, counted
from benchmarks.distributed.worker import Measurement


def test_only_the_all_reduce_grows_with_the_ranks() -> None:
    host = model.fitted("one", (200, 500.0), (1000, 1300.0), 100.0, 2)
    assert host.each == pytest.approx(1.0)
    assert host.fixed == pytest.approx(100.0)
    few, many = host.total(5000, 8), host.total(5000, 16384)
    assert many - few == pytest.approx(2 * (model.all_reduce(16384) - model.all_reduce(8)))
    assert model.all_reduce(16384) == pytest.approx(28 * model.ALPHA_US, rel=1e-3)
    assert model.all_reduce(1) < 0.1


def test_collectives_are_counted() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        numbers = torch.ones(3)
        with counted() as made:
            dist.all_reduce(numbers)
            torch.ops._c10d_functional.all_reduce(numbers, "sum", dist.group.WORLD.group_name)  # type: ignore[union-attr]
        assert len(made) == 2
    finally:
        dist.destroy_process_group()


def rows() -> list[Measurement]:
    return [
        Measurement(name, count, 2, 90.0, 100.0 * (1 if name != "torch, DTensors" else count / 30), 110.0, 1, 1e-8)
        for count in command.COUNTS
        for name in CLIPS
    ]


def test_tables_and_bars() -> None:
    text = command.contenders(rows())
    assert "33.3x" in text
    assert "16,384 ranks" in command.on_paper(rows())
    assert "2 ranks" in command.scaling([row for row in rows() if row.parameters == 200])
    assert [command.bar(rows(), count, least)[1] for count, least in command.BARS.items()] == [True, True]
    assert not command.bar(rows(), 200, 7.0)[1]
    assert FLOOR in text
