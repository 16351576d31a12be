"""Races, stray reads and wrong numbers of the CUDA kernels, executed without a GPU: tests/cuda_shim compiles their own
source for the host.

Its driver holds them against an fp64 oracle under the sanitizers, a thread for each of a GPU's where races are looked
for; then the common tests run on the whole engine, from Python, as if the CPU were its device.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import EXAMPLES
from .cuda_shim import build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="g++ was not found")
one_build = pytest.mark.xdist_group("thread sanitizer")
COMMON = ["test_clip_norm", "test_per_tensor", "test_nonfinite", "test_layouts", "test_determinism", "test_properties"]
COMMON += ["test_norm_accuracy", "test_coefficients", "test_overlap", "test_cuda_forms", "test_threads", "test_scopes"]
COMMON += ["test_shared_memory", "test_stats", "test_properties_shared", "test_interrupts", "test_call_depth"]
COMMON += ["adaptive/test_formulas"]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.driver(tmp_path_factory.mktemp("tsan"), "thread")


def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    done = run([str(build.driver(tmp_path, "address,undefined"))])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: failing calls" in done.stdout  # the last one


@one_build
def test_kernels_under_thread_sanitizer(thread_sanitized: Path) -> None:
    done = run([str(thread_sanitized), "quick"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: failing calls" in done.stdout


@one_build
@pytest.mark.parametrize("barrier", [2, 3, -1], ids=["publish", "reuse", "grid"])
def test_a_missing_barrier_is_caught(thread_sanitized: Path, barrier: int) -> None:
    first = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = run([str(thread_sanitized), "quick", f"drop={barrier}"], env=first)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_the_whole_engine_passes_the_common_tests(tmp_path: Path) -> None:
    for folder in ("fusedclip", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    build.extension(tmp_path / "fusedclip")
    environment = {**os.environ, "FUSEDCLIP_ENGINES": "cuda", "FUSEDCLIP_EXAMPLES": str(max(EXAMPLES // 10, 1))}
    tests = [f"tests/{name}.py" for name in COMMON]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_shim.plugin", "-p", "no:cacheprovider"]
    done = run([*command, "-k", "cuda-cpu", *tests], cwd=tmp_path, env=environment)  # none at all is a failure, too
    assert done.returncode == 0, done.stdout + done.stderr
