"""The Triton engine's table of measured tunings: who gets which row, who the default, and what is no row at all."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedclip.backends.triton import tuning
from fusedclip.backends.triton.tuning import DEFAULT, INTERPRETER, NVIDIA, Row, Tuning

CPU = torch.device("cpu")
ONE = frozenset([torch.float32])
FASTER = Tuning(32768, 8192, 8, 4, (("maxnreg", 64),))
ROW = Row("interpreter", "float32", FASTER, 1.25, "a device", "3.9.0", "2026-01-31")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test's own table is, which nothing outside of the test sees."""
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuning.json")
    tuning.tuning_for.cache_clear()
    yield tmp_path / "tuning.json"
    tuning.tuning_for.cache_clear()


def test_the_packaged_table_can_be_read() -> None:
    assert tuning.TABLE.parent == Path(tuning.__file__).parent
    tuning.read_rows(tuning.TABLE)


def test_rows_read_back_the_same(path: Path) -> None:
    other = replace(ROW, architecture="sm_90", dtype="bfloat16", tuning=Tuning())
    tuning.write_rows(path, [other, ROW])
    assert tuning.read_rows(path) == [ROW, other]
    assert len(path.read_text().splitlines()) == 4
    tuning.write_rows(path, [])
    assert tuning.read_rows(path) == []


def test_a_row_serves_its_architecture_and_dtype_alone(path: Path) -> None:
    tuning.write_rows(path, [ROW, replace(ROW, architecture="sm_90", dtype="float16")])
    assert tuning.tuning_for(CPU, ONE) == FASTER
    for dtypes in ([torch.float16], [torch.float32, torch.float16], []):
        assert tuning.tuning_for(CPU, frozenset(dtypes)) == INTERPRETER


@pytest.mark.parametrize(("hip", "expected"), [(None, NVIDIA), ("6.4", DEFAULT)])
def test_a_gpu_without_a_row_gets_the_default_of_its_kind(
    path: Path, monkeypatch: pytest.MonkeyPatch, hip: str | None, expected: Tuning
) -> None:
    tuning.write_rows(path, [ROW, replace(ROW, architecture="sm_80")])
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(tuning, "architecture_of", lambda device: "sm_90" if hip is None else "gfx942")
    assert tuning.tuning_for(torch.device("cuda", 0), ONE) == expected


def test_architectures_are_called_as_the_compiler_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert tuning.architecture_of(torch.device("cuda", 0)) == "sm_100"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = type("Properties", (), {"gcnArchName": "gfx942:sramecc+:xnack-"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tuning.architecture_of(torch.device("cuda", 0)) == "gfx942"


def test_the_file_is_read_once(path: Path) -> None:
    tuning.write_rows(path, [ROW])
    first = tuning.tuning_for(CPU, ONE)
    path.unlink()
    assert tuning.tuning_for(CPU, ONE) is first
    assert tuning.tuning_for(CPU, frozenset([torch.float16])) == INTERPRETER


def as_json(**changes: Any) -> dict[str, Any]:
    """The row, with changes to itself or, where that has the name, to its tuning."""
    shape = {"tile_bytes": 65536, "step_bytes": 16384, "num_warps": 4, "programs_per_processor": 5, "limits": {}}
    shape |= {name: value for name, value in changes.items() if name in shape}
    own = {name: value for name, value in changes.items() if name not in shape}
    given = {"architecture": "sm_90", "dtype": "float32", "gain": 1.1, "device": "d", "triton": "3.9", "date": "today"}
    return {**given, "tuning": shape, **own}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("fast", r"a row has architecture, dtype, tuning, gain, .*; here is 'fast'"),
        ({}, "here is nothing"),
        (as_json(colour="red"), "here is architecture, .*colour"),
        (as_json(tuning={"num_warps": 4}), r"a tuning has tile_bytes, .*; here is num_warps"),
        (as_json(tuning=None), "here is None"),
        (as_json(dtype="int8"), "dtype is 'int8', and there are bfloat16, float16, float32, float64"),
        (as_json(dtype=["float32"]), "dtype is .'float32'., not a string"),
        (as_json(architecture=90), "architecture is 90, not a string"),
        (as_json(gain=float("nan")), "gain is nan"),
        (as_json(gain="1.1"), "gain is '1.1'"),
        (as_json(tile_bytes=65536 + 4096), "a tile is a whole number of steps"),
        (as_json(step_bytes=2048), "a power of two from 4096"),
        (as_json(tile_bytes=17 * 16384), "16 at most"),
        (as_json(tile_bytes=131072, step_bytes=131072), "to 65536 bytes"),
        (as_json(step_bytes=0), "step_bytes is 0, not a positive integer"),
        (as_json(num_warps=3), "num_warps is 3, not a power of two"),
        (as_json(num_warps=True), "num_warps is True"),
        (as_json(programs_per_processor=2.5), "programs_per_processor is 2.5, not a positive integer"),
        (as_json(limits=[["maxnreg", 96]]), "limits is .*, not an object"),
        (as_json(limits={"maxnreg": -1}), "maxnreg is -1"),
        (as_json(gain=2.0), "there is a row for float32 on sm_90 already"),
    ],
)
def test_a_bad_row_names_the_file_and_itself(path: Path, row: object, reason: str) -> None:
    path.write_text(json.dumps([as_json(), row]))
    with pytest.raises(ValueError, match=rf"tuning\.json, row 2: .*{reason}.*benchmarks tune"):
        tuning.tuning_for(CPU, ONE)


@pytest.mark.parametrize(("text", "reason"), [("[{]", "is not JSON: .*column 3"), ("{}", "is not a list of rows")])
def test_a_bad_file_names_itself(path: Path, text: str, reason: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"tuning\.json {reason}"):
        tuning.tuning_for(CPU, ONE)


def test_what_is_forced_has_tables_of_its_own(path: Path) -> None:
    pytest.importorskip("triton")
    from fusedclip.backends.triton import tables
    from fusedclip.gradients import Batch

    tuning.write_rows(path, [ROW])
    batch = Batch([torch.zeros(7, dtype=torch.float32)], CPU)
    mixed = Batch([torch.zeros(7, dtype=torch.float32), torch.zeros(7, dtype=torch.float16)], CPU)
    tables._tables.cached.clear()
    measured = tables.table_for(batch)
    with tuning.use(INTERPRETER):
        forced = tables.table_for(batch)
        assert forced is not measured
        assert forced is tables.table_for(batch)
    assert tables.table_for(batch) is measured
    assert measured.options == FASTER.options()
    assert measured.shape["TILE_BYTES"] == FASTER.tile_bytes
    assert forced.shape == tables.table_for(mixed).shape | {"DTYPES": forced.plan.dtypes}
    assert forced.options == INTERPRETER.options()
    tables._tables.cached.clear()
