"""Whether the CUDA half is built, and for what, goes by what nvcc knows: an old one refuses, and the build with it."""

import shutil
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).parent.parent / "csrc" / "cuda" / "nvcc.cmake"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def ask(function: str, nvcc: str, folder: Path) -> tuple[str, str]:
    """What the module's function gives, and what it says, with a compiler that answers as this shell script does."""
    compiler, script = folder / "nvcc", folder / "ask.cmake"
    compiler.write_text(f"#!/bin/sh\n{nvcc}\n")
    compiler.chmod(0o755)
    lines = ["cmake_minimum_required(VERSION 3.18...4.0)", f'include("{MODULE}")']
    lines += [f'{function}("{compiler}" answer)', 'message(STATUS "${answer}")']
    script.write_text("\n".join(lines))
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, timeout=60)
    return done.stdout.strip().removeprefix("--").strip(), " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("listed", "chosen", "left_out"),
    [
        ("compute_75 compute_80 compute_90 compute_100 compute_103 compute_120", "80;90;100;120", None),
        ("compute_50 compute_80 compute_86 compute_89 compute_90", "80;90", "100, 120"),  # CUDA 12.4
        ("compute_52 compute_80 compute_86", "80", "90, 100, 120"),  # CUDA 11.7
    ],
)
def test_what_nvcc_knows_is_built(tmp_path: Path, listed: str, chosen: str, left_out: str | None) -> None:
    found, said = ask("architectures_known_to", f"printf '%s\\n' {listed}", tmp_path)
    assert found == chosen
    assert (f"does not know compute capability {left_out}:" in said) if left_out else not said


@pytest.mark.parametrize(("nvcc", "reason"), [("echo compute_50", "knows none"), ("exit 3", "failed (3)")])
def test_a_compiler_that_is_of_no_use_ends_the_build(tmp_path: Path, nvcc: str, reason: str) -> None:
    found, said = ask("architectures_known_to", nvcc, tmp_path)
    assert not found
    assert reason in said


@pytest.mark.parametrize(("release", "is_refused"), [("11.8", True), ("12.0", True), ("12.1", False), ("13.0", False)])
def test_a_compiler_whose_kernel_parameters_end_at_4_kb_is_not_used(
    tmp_path: Path, release: str, is_refused: bool
) -> None:
    version = f"Cuda compilation tools, release {release}, V{release}.88"
    refusal, said = ask("refusal_of", f"echo '{version}'", tmp_path)
    assert (f"is of CUDA {release}, and 12.1 is the first" in refusal) if is_refused else not refusal
    assert not said
