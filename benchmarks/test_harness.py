"""The harness itself: workloads are what they are called, wrong contenders fail, files can be read back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import cli, compare, plots, table, workloads
from benchmarks.contenders import TORCH_FOREACH, Contender, torch_contender
from benchmarks.measure import Settings, run_suite
from benchmarks.oracle import ulp
from benchmarks.release import bars
from benchmarks.results import Claim, Measurement, Report, Row
from benchmarks.suites import SUITES, Operation, suite
from benchmarks.timing import Budget, Entry, take_turns
from benchmarks.train.experiments import outcome
from benchmarks.train.pair import largest_difference

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2", 148, 124_439_808),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama3-8b-shard", 291, 8_030_261_248 // 8),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("lora-8b", 448, 41_943_040),
    ],
)
def test_workloads_have_the_published_size(name: str, tensors: int, elements: int) -> None:
    workload = workloads.load(name, 4, budget_bytes=1 << 40)
    assert (len(workload.shapes), workload.elements, workload.cut) == (tensors, elements, None)


def test_cut_fits_the_budget_and_says_so() -> None:
    workload = workloads.load("gpt2-xl", 4, budget_bytes=1 << 30)
    assert workload.elements * 4 <= 1 << 30
    assert workload.cut == "6 of 48 layers"
    assert workload.cut in workload.title


def test_every_suite_names_known_workloads() -> None:
    assert all(case.workload in workloads.CATALOGUE for known in SUITES.values() for case in known.cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ulp_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, -3.0, 1e-3, 1e-30, 0.0], dtype=dtype)
    following = torch.nextafter(values.abs(), torch.tensor(math.inf, dtype=dtype))
    assert torch.equal(ulp(values.double(), dtype), following.double() - values.abs().double())


def clip_by(change: Callable[[Tensor], Tensor], factor: float = 1.0) -> Contender:
    """A contender that clips as torch does, then changes every gradient and returns another norm."""

    @torch.no_grad()
    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(change(parameter.grad))
        return norm * factor

    return Contender("fusedclip wrong", {Operation.NOT_CLIPPED: clip, Operation.CLIPPED: clip})


def rows_of(*contenders: Contender, operations: Sequence[Operation] = tuple(Operation)) -> list[Row]:
    short = suite(0.01, (["host-10x256"], ["float32"], operations))
    return list(run_suite(short, Settings(CPU, contenders), lambda case: None))


@pytest.mark.parametrize(
    "wrong",
    [
        clip_by(lambda gradient: gradient * math.nan),
        clip_by(lambda gradient: gradient * (1 + 1e-6)),
        clip_by(torch.zeros_like),
        clip_by(lambda gradient: gradient, factor=1 + 1e-6),
        clip_by(lambda gradient: gradient, factor=math.nan),
    ],
    ids=["NaN elements", "elements off", "zeros", "norm off", "NaN norm"],
)
def test_wrong_answers_are_not_timed(wrong: Contender) -> None:
    for row in rows_of(wrong, torch_contender(TORCH_FOREACH, foreach=True), operations=list(wrong.calls)):
        failed, timed = row.contenders
        assert failed.failure
        assert math.isnan(failed.p50_us)
        assert not timed.failure
        assert timed.p50_us > 0


def test_an_exception_stays_in_its_row() -> None:
    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        raise TypeError("no such gradients")

    (row,) = rows_of(Contender("fusedclip broken", {Operation.CLIPPED: clip}), operations=[Operation.CLIPPED])
    assert row.contenders[0].failure == "TypeError: no such gradients"


def report_of(rows: list[Row]) -> Report:
    versions = {"torch": "2", "python": "3", "fusedclip": "0"}
    commit = {"hash": None, "dirty": None}
    return Report(
        {"device": "x", "threads": 2, "versions": versions, "commit": commit, "date": "2000-01-01"}, "s", 0, rows
    )


def test_saved_reports_read_back_the_same(tmp_path: Path) -> None:
    report = report_of(rows_of(torch_contender(TORCH_FOREACH, foreach=True)))
    report.claims = [Claim("c", 2.0, 1.0, "x", more_is_better=True)]
    report.save(tmp_path / "deeper" / "one.json")
    again = Report.load(tmp_path / "deeper" / "one.json")
    assert again == report
    assert table.details(again) == table.details(report)
    assert "within noise" in compare.compare(again, report)
    assert plots.draw_all(again, tmp_path) == []  # of host rows there is none


def row_with(ours_us: float, torch_us: float, floor_us: float) -> Row:
    ours = Measurement(
        "fusedclip cpu", p20_us=ours_us, p50_us=ours_us, p80_us=ours_us, ratio_to_foreach=torch_us / ours_us
    )
    ours.floor_fraction = floor_us / ours_us
    foreach = Measurement(TORCH_FOREACH, p20_us=torch_us, p50_us=torch_us, p80_us=torch_us)
    floor = Measurement("read floor", p20_us=floor_us, p50_us=floor_us, p80_us=floor_us)
    return Row("gpt2", "GPT-2", None, 1, 1, 4, "float32", "not clipped", "cpu", 2, floor, [foreach, ours])


def claims_of(row: Row) -> list[Claim]:
    return bars.claims(report_of([row]))


def test_a_ratio_that_falls_short_counts_by_the_read_floor() -> None:
    enough, at_the_floor, slow = (claims_of(row_with(ours, 30.0, 9.5))[0] for ours in (9.0, 10.0, 12.0))
    assert enough.holds
    assert enough.unit == "x"
    assert at_the_floor.holds
    assert at_the_floor.value == pytest.approx(0.95)
    assert "3.00x falls short of 3.3x" in at_the_floor.note
    assert not slow.holds
    assert slow.value == pytest.approx(2.5)


def test_a_wrong_answer_fails_its_claims() -> None:
    row = row_with(9.0, 30.0, 9.5)
    row.contenders[1] = Measurement("fusedclip cpu", failure="norm off", norm_error=math.nan)
    assert [claim.holds for claim in claims_of(row)] == [False, False]


def test_a_disturbed_floor_excuses_nothing_and_is_told() -> None:
    row = row_with(12.0, 30.0, 9.5)
    row.bytes = 1 << 20
    row.floor.p50_us = row.floor.p80_us = 500.0
    (claim,) = [claim for claim in claims_of(row) if claim.unit == "x"]
    assert not claim.holds
    assert "busy" in claim.note


def test_compare_tells_a_change_from_a_slower_machine() -> None:
    before = report_of([row_with(10.0, 30.0, 9.0)])
    for after, verdict in {
        (8.0, 30.0): "faster",
        (13.0, 30.0): "slower",
        (20.0, 60.0): "moved with the machine",
        (10.5, 30.0): "within noise",
    }.items():
        *_, ours = compare.in_both(before, report_of([row_with(*after, 9.0)]))
        assert compare.line(*ours)[-1] == verdict


def test_training_verdicts_follow_the_losses() -> None:
    assert [outcome([loss] * 30) for loss in (2.0, 4.5, 50.0, math.nan, math.inf)] == [
        *("learned", "neither diverged nor learned"),
        *("diverged", "diverged", "diverged"),
    ]
    assert largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert largest_difference([1.0, 2.0], [1.0]) == math.inf
    assert largest_difference([1.0, math.nan], [1.0, 2.0]) == math.inf


def test_a_slow_contender_does_not_use_up_the_others_rounds() -> None:
    entries = [Entry("slow", lambda: time.sleep(0.02)), Entry("fast", lambda: None)]
    samples = take_turns(entries, CPU, Budget(seconds=0.1, most=50), seed=0)
    assert (len(samples["slow"]), len(samples["fast"])) == (3, 50)


def test_options_stand_before_or_behind_the_command() -> None:
    for order in (["--seed", "5", "--quick", "gpu", "--out", "x"], ["gpu", "--out", "x", "--quick", "--seed", "5"]):
        options = cli.parse(order)
        assert (options.seed, options.quick, options.device, options.memory) == (5, True, "cuda", 2.0)
    for order in (["--seed", "5", "--threads", "3", "run"], ["run", "--threads", "3", "--seed", "5"]):
        options = cli.parse(order)
        assert (options.seed, options.threads, options.quick, options.contender) == (5, 3, None, None)
