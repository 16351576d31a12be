"""The parts that a GPU run is made of: checks, launch capacity, the clock, the reader."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.environment import ROOT
from benchmarks.gpu import checks, foreach
from benchmarks.gpu.checks import Check


def test_a_check_tells_how_it_ended() -> None:
    def python(code: str, seconds: float = 60.0) -> Check:
        return checks.run("x", [sys.executable, "-c", code], seconds, {"FUSEDCLIP_TEST": "heard"})

    assert python("import os; print(os.environ['FUSEDCLIP_TEST'])").told == "heard"
    failed = python("import sys; print('why'); sys.exit(3)")
    assert (failed.outcome, failed.told) == ("failed", "why")
    start = time.perf_counter()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert python(child, seconds=1.0).outcome == "timed out"
    assert time.perf_counter() - start < 30  # the child held the pipe open: it went as well


@pytest.mark.parametrize("capacity", [1, 2, 110, 1023, 4095])
def test_launch_capacity(capacity: int) -> None:
    assert foreach.most_in_one(lambda count: -(-count // capacity)) == capacity


def test_launch_capacity_that_cannot_be_seen() -> None:
    assert foreach.most_in_one(lambda count: 0) is None
    assert foreach.most_in_one(lambda count: 1) is None


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
    assert log == [*first, "record", "wait", *second, "record", "wait"]
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
