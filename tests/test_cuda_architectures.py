"""What the CUDA half is built for goes by what nvcc knows: one that is too old refuses a GPU, and the build with it."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parent.parent / "csrc" / "cuda" / "architectures.cmake"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def known_to(nvcc: str, folder: Path) -> tuple[str, str]:
    """What cmake chooses, and what it says, with a compiler that answers as this shell script does."""
    compiler, script = folder / "nvcc", folder / "ask.cmake"
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    lines = ["cmake_minimum_required(VERSION 3.18...4.0)", f'include("{MODULE}")']
    lines += [f'architectures_known_to("{compiler}" chosen)', 'message(STATUS "chosen: ${chosen}")']
    script.write_text("\n".join(lines))
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, timeout=60)
    return done.stdout.strip(), " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("listed", "chosen", "left_out"),
    [
        ("compute_75 compute_80 compute_90 compute_100 compute_103 compute_120", "80;90;100;120", None),
        ("compute_50 compute_80 compute_86 compute_89 compute_90", "80;90", "100, 120"),  # CUDA 12.4
        ("compute_52 compute_80 compute_86", "80", "90, 100, 120"),  # CUDA 11.7
    ],
)
def test_what_nvcc_knows_is_built(tmp_path: Path, listed: str, chosen: str, left_out: str | None) -> None:
    found, said = known_to(f"printf '%s\\n' {listed}", tmp_path)
    assert found == f"-- chosen: {chosen}"
    assert (f"does not know compute capability {left_out}:" in said) if left_out else not said


@pytest.mark.parametrize(("nvcc", "reason"), [("echo compute_50", "knows none"), ("exit 3", "failed (3)")])
def test_a_compiler_that_is_of_no_use_ends_the_build(tmp_path: Path, nvcc: str, reason: str) -> None:
    found, said = known_to(nvcc, tmp_path)
    assert not found
    assert reason in said
