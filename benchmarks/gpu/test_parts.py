"""The parts that a GPU run is made of: checks, the clock, the reader."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.environment import ROOT
from benchmarks.release import checks
from benchmarks.release.checks import Check, Task


def python(code: str, logs: Path, seconds: float = 60.0, proof: str = "", most: float = math.inf) -> Check:
    task = Task("a check", [sys.executable, "-c", code], seconds, {"FUSEDCLIP_TEST": "heard"}, proof)
    return checks.run(task, logs, most)


def test_a_check_tells_how_it_ended(tmp_path: Path) -> None:
    assert python("import os; print(os.environ['FUSEDCLIP_TEST'])", tmp_path).output == "heard"
    failed = python("import sys; print('why'); sys.exit(3)", tmp_path)
    assert (failed.outcome, failed.output) == ("failed", "why")
    assert (
        python("import os; os.write(1, bytes([255, 10]) * 100)", tmp_path).output.count("\n") == checks.LINES_KEPT - 1
    )
    assert (tmp_path / checks.LOG).read_bytes().endswith(b"== a check ==\n" + bytes([255, 10]) * 100)


def test_a_check_that_does_not_end_is_ended(tmp_path: Path) -> None:
    start = time.perf_counter()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert python(child, tmp_path, seconds=1.0).outcome == "timed out"
    assert python(child, tmp_path, most=1.0).outcome == "timed out"
    assert time.perf_counter() - start < 30
    assert python("", tmp_path, most=-1.0).outcome == "left out"


def test_a_check_that_has_not_looked_has_not_passed(tmp_path: Path) -> None:
    assert python("print('ERROR SUMMARY: 0 errors')", tmp_path, proof="SUMMARY: 0 errors").outcome == "passed"
    assert python("print('no process found')", tmp_path, proof="SUMMARY: 0 errors").outcome == "failed"


def test_every_sanitizer_needs_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path="": "/bin/compute-sanitizer")
    tasks = checks.sanitizers()
    assert len(tasks) == 3
    assert all(isinstance(task, Task) and "SUMMARY: 0 " in task.proof for task in tasks)
    monkeypatch.setattr(shutil, "which", lambda name, path="": None)
    (check,) = checks.sanitizers()
    assert isinstance(check, Check)
    assert check.outcome == "left out"


def test_the_gpu_clock_hides_the_host_in_its_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    slept: list[int] = []

    def event(enable_timing: bool) -> Any:
        return SimpleNamespace(record=lambda: log.append("record"), elapsed_time=lambda end: 7.0)

    def sleep(cycles: int) -> None:
        log.append("sleep")
        slept.append(cycles)

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    times = timing.cuda_clock(timing.Entry("x", lambda: log.append("call"), lambda: log.append("before")))
    first, second = ["before", "wait", "record", "call"], ["before", "wait", "sleep", "record", "call"]
    assert log == ["record", *first, "record", "wait", "record", *second, "record", "wait"]
    assert (times.wall, times.device) == (7e6, 7e6)
    assert slept[0] >= 2 * (times.host + timing.HEAD_START_NS)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_reader_reads_every_word() -> None:
    code = """
import torch
from benchmarks.gpu.reader import read
words = torch.randint(-2**62, 2**62, (7 * 1024,))
out = torch.empty(3, dtype=torch.int64)
read(words, out, 1024)
right = 0
for word in words.tolist(): right ^= word
got = 0
for word in out.tolist(): got ^= word
assert got == right
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_reader_loads_16_bytes_at_a_time() -> None:
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.gpu.reader import _read
signature = {"words": "*i64", "out": "*i64", "count": "i32", "BLOCK": "constexpr"}
attrs = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
source = ASTSource(_read, signature, constexprs={(3,): 2048}, attrs=attrs)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads = [line for line in done.stdout.splitlines() if "ld.global" in line]
    assert loads
    assert all(".v2.b64" in line or ".v4.b32" in line for line in loads)
