"""The claims, tables and pictures of a GPU run, from made-up rows of the real suite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import plots, table, workloads
from benchmarks.contenders import TORCH_FOREACH
from benchmarks.gpu import command
from benchmarks.gradients import dtypes_of
from benchmarks.optimizer_step import CHOOSES, DEFERS, DROP_IN, SCALES, STEP, TORCH, UNSCALE_OURS, UNSCALE_TORCH
from benchmarks.release import bars
from benchmarks.results import Measurement, Report, Row
from benchmarks.suites import BOTH, SUITES, Case, Operation

CUDA, TRITON = "fusedclip cuda", "fusedclip triton"
READ, COPY = 3000.0, 2800.0
CEILINGS = {"read": READ, "read_by": "a reader", "copy": COPY, "copy_by": "a copier"}


def timed(name: str, us: float) -> Measurement:
    """By every clock."""
    return Measurement(name, p20_us=us, p50_us=us, p80_us=us, host_us=us, device_us=us, norm_error=1e-9)


def made_up_row(case: Case) -> Row:
    """As large as the case is, nobody timed yet but a sum at 2,900 GB/s."""
    dtypes = dtypes_of(case.dtype)
    workload = workloads.load(case.workload, dtypes[0].itemsize, 2 << 30)
    nbytes = workload.elements * sum(dtype.itemsize for dtype in dtypes) // len(dtypes)
    return Row(
        workload=case.workload,
        title=workload.title,
        cut=workload.cut,
        tensors=len(workload.shapes),
        elements=workload.elements,
        bytes=nbytes,
        dtype=case.dtype,
        operation=case.operation.value,
        device="cuda",
        threads=1,
        floor=timed("read floor", nbytes / 2900e3),
    )


def made_up_report(ours: Callable[[Row], float], failure: str = "") -> Report:
    """All rows of the suite: our engines in the microseconds given, torch in ten times that."""
    report = empty_report()
    for row in map(made_up_row, SUITES["gpu"].cases):
        us = ours(row)
        cuda = Measurement(CUDA, failure) if failure else timed(CUDA, us)
        cuda.ratio_to_foreach = math.nan if failure else 10.0
        row.contenders = [timed(TORCH_FOREACH, 10 * us), cuda, timed(TRITON, us)]
        report.rows.append(row)
    ways = {STEP: 1.0, TORCH: 1.5, DROP_IN: 1.15, SCALES: 1.16, DEFERS: 1.14, CHOOSES: 1.15}
    for operation in BOTH:
        report.rows.append(made_up_steps(f"step, {operation.value}", ways))
        report.rows.append(made_up_steps(f"unscale, {operation.value}", {UNSCALE_TORCH: 1.0, UNSCALE_OURS: 0.5}))
    report.gpu |= {"ceilings": CEILINGS}
    return report


def made_up_steps(operation: str, ways: dict[str, float]) -> Row:
    row = made_up_row(Case("gpt2-xl", "float32", Operation.CLIPPED))
    row.operation, row.contenders = operation, [timed(way, 1000 * ratio) for way, ratio in ways.items()]
    return row


def empty_report() -> Report:
    versions = {"torch": "2", "python": "3", "fusedclip": "0"}
    environment = {"device": "a GPU", "threads": 2, "versions": versions, "date": "2000-01-01T00:00:00"}
    report = Report(environment | {"commit": {"hash": None, "dirty": None}}, "gpu", 0)
    report.gpu = {"sources": {}, "checks": []}
    return report


def at_the_ceiling(row: Row) -> float:
    """Microseconds of reading the bytes once, and moving them twice more if the operation clips."""
    read, copy = row.bytes / READ / 1e3, row.bytes / COPY / 1e3
    return read + (2 * copy if row.operation == Operation.CLIPPED.value else 0.0)


def test_every_promise_is_a_claim() -> None:
    found = bars.claims(made_up_report(at_the_ceiling))
    names = "\n".join(claim.name for claim in found)
    for part in (
        *("norm pass, >= 1 GB, float32, fusedclip cuda", "norm pass, >= 1 GB, bfloat16, fusedclip cuda"),
        *("norm pass, >= 1 GB, float32, fusedclip triton", "norm pass, >= 1 GB, bfloat16, fusedclip triton"),
        *("not clipped, >= 1 GB", "N / read ceiling + 2 N / copy ceiling", "8 to 48 MB", "2,000 tensors of 4 KB"),
        *("unscale + clip, >= 1 GB", "500x450000 mixed clipped", "one-1.536e9 bfloat16 clipped"),
        *("one-1.536e9 bfloat16 not clipped", "host time of a call", "(clip + fused AdamW) / AdamW"),
    ):
        assert part in names
    assert len(found) == 15


def test_claims_compute_what_they_say() -> None:
    found = {claim.name: claim for claim in bars.claims(made_up_report(at_the_ceiling))}
    read, clipped = (next(c for n, c in found.items() if part in n) for part in ("bfloat16, fusedclip cuda", "2 N"))
    assert read.value == pytest.approx(1.0)
    assert clipped.value == pytest.approx(1.0)
    assert next(c for n, c in found.items() if n.startswith("not clipped")).value == pytest.approx(10.0)
    assert next(c for n, c in found.items() if n.startswith("(clip")).value == pytest.approx(1.14)
    assert next(c for n, c in found.items() if n.startswith("unscale")).value == pytest.approx(2.0)
    mixed = next(c for n, c in found.items() if n.startswith("500x450000"))
    assert mixed.value == pytest.approx(225e6 * 3 * (1 / 3000 + 2 / 2800) / 1e6)
    assert mixed.holds
    assert "3.93 ms" in mixed.note


def test_the_slowest_row_decides() -> None:
    def slow_once(row: Row) -> float:
        return at_the_ceiling(row) * (2 if row.workload == "gpt2-xl" and row.dtype == "bfloat16" else 1)

    found = {claim.name: claim for claim in bars.claims(made_up_report(slow_once))}
    assert not found["norm pass, >= 1 GB, bfloat16, fusedclip cuda"].holds
    assert "GPT-2 XL" in found["norm pass, >= 1 GB, bfloat16, fusedclip cuda"].note
    assert found["norm pass, >= 1 GB, float32, fusedclip cuda"].holds


def test_a_sum_that_reads_faster_than_the_ceiling_takes_its_place() -> None:
    report = made_up_report(at_the_ceiling)
    for row in report.rows:
        row.floor.device_us = at_the_ceiling(row) / 2
    found = {claim.name: claim for claim in bars.claims(report)}
    assert found["norm pass, >= 1 GB, float32, fusedclip cuda"].value == pytest.approx(0.5)


def test_wrong_answers_fail_their_claims(tmp_path: Path) -> None:
    report = made_up_report(at_the_ceiling, failure="norm off")
    report.claims = bars.claims(report)
    report.save(tmp_path / "x.json")
    for found in (report.claims, Report.load(tmp_path / "x.json").claims):
        ours = [claim for claim in found if claim.name.endswith(CUDA)]
        assert len(ours) == 11
        assert not any(claim.holds for claim in ours)
        assert all("norm off" in claim.note for claim in ours)
        assert "NO" in table.claims(report)
    assert command.failed(report)


def test_nothing_measured_claims_nothing_and_says_what_is_missing() -> None:
    assert bars.claims(empty_report()) == []
    assert len(bars.missing(empty_report())) == 15
    whole = made_up_report(at_the_ceiling)
    whole.claims = bars.claims(whole)
    assert bars.missing(whole) == []
    whole.gpu.pop("ceilings")
    for row in whole.rows:
        row.bytes = 1000 if row.is_step else row.bytes
    whole.claims = bars.claims(whole)
    assert len(bars.missing(whole)) == 7


def test_torch_failing_is_told() -> None:
    report = made_up_report(at_the_ceiling)
    for row in report.rows:
        if not row.is_step:
            row.contenders[0] = Measurement(TORCH_FOREACH, failure="torch is off")
    (claim,) = [claim for claim in bars.claims(report) if claim.name.startswith("8 to 48 MB")]
    assert not claim.holds
    assert "torch is off" in claim.note


def test_pictures_and_tables_of_a_whole_run(tmp_path: Path) -> None:
    report = made_up_report(at_the_ceiling)
    report.claims = bars.claims(report)
    assert "ceilings: read" in command.machine(report)
    assert tmp_path / "roofline.png" in plots.draw_all(report, tmp_path)
    clips, steps = command.summary(report).split("\n\n")
    assert clips.count("\n") == len([row for row in report.rows if not row.is_step]) + 1
    assert UNSCALE_OURS in steps
    assert "NO" not in table.claims(report).replace("NOT", "")
