"""What nvcc makes of the kernels, without a GPU: nothing in local memory, 16-byte loads and stores, resident blocks."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")
REGISTERS = 65536  # of an SM, from Ampere to Blackwell
ARCHITECTURES = (80, 90, 100, 120)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


class Kernel(NamedTuple):
    name: str
    architecture: int
    stack: int
    spilled: int
    registers: int


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kernel]]:
    made = tmp_path_factory.mktemp("compiled") / "engine.o"
    command = [str(NVCC), "-std=c++17", "-O3", "--threads=2", "-Xptxas=-v", "-c", "-o", str(made)]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    done = subprocess.run([*command, str(CSRC / "cuda/engine.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return made, [Kernel(name, *map(int, numbers)) for name, *numbers in found]


def test_every_kernel_is_there(compiled: tuple[Path, list[Kernel]]) -> None:
    for architecture in ARCHITECTURES:
        names = [kernel.name for kernel in compiled[1] if kernel.architecture == architecture]
        # 6 norms to read, 4 on chip; combine, settle, scale, clamp; each for two sizes of table. And one more.
        assert len(names) == 2 * (6 + 4 + 4) + 1
        assert sum("clip_on_chip" in name for name in names) == 8


def test_nothing_is_in_local_memory(compiled: tuple[Path, list[Kernel]]) -> None:
    assert [k for k in compiled[1] if k.stack or k.spilled] == []


def test_registers_leave_room_for_the_policys_blocks(compiled: tuple[Path, list[Kernel]]) -> None:
    for kernel in compiled[1]:
        threads, blocks = policy(kernel.architecture)
        one = "clip_on_chip" in kernel.name or "NormE3" in kernel.name  # on chip, and powers
        assert kernel.registers * threads * (1 if one else blocks) <= REGISTERS, kernel


def test_packs_are_moved_by_16_byte_instructions(compiled: tuple[Path, list[Kernel]]) -> None:
    sass = disassembly(compiled[0], 90)
    assert len(sass) == len(compiled[1]) / len(ARCHITECTURES)
    for name, code in sass.items():
        assert "LDL" not in code, name
        assert "STL" not in code, name
        if "read_kernel" in name or "clamp" in name or "scale_kernel" in name or "on_chip" in name:
            assert len(re.findall(r"LDG\.E\.128", code)) >= 4, name
        if "clamp" in name or "scale_kernel" in name or "on_chip" in name:
            assert len(re.findall(r"STG\.E\.128", code)) >= 4, name
        if "on_chip" in name:
            assert "LDS.128" in code, name
            assert "STS.128" in code, name


def policy(architecture: int) -> tuple[int, int]:
    """(threads, blocks per SM) in the table."""
    text = (CSRC / "cuda/launch_policy.h").read_text()
    row = re.search(rf"\{{{architecture}, (\d+), (\d+),", text)
    assert row is not None
    return int(row[1]), int(row[2])


def disassembly(made: Path, architecture: int) -> dict[str, str]:
    tool = shutil.which("cuobjdump") or _from_triton()
    if tool is None:
        pytest.skip("cuobjdump was not found, in the CUDA toolkit or in Triton")
    command = [tool, "-sass", "-arch", f"sm_{architecture}", str(made)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split(maxsplit=1)[0]: part for part in text.split("Function : ")[1:]}


def _from_triton() -> str | None:
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton is here")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(tool) if tool.exists() else None
