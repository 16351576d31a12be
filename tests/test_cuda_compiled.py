"""What nvcc makes of the kernels, without a GPU: nothing in local memory, 16-byte loads and stores, resident blocks.

Judged is the extension that the tests run with, if its CUDA half is of today's source; or else a fresh compilation,
which takes a minute and a half.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from fusedclip import _extension

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = shutil.which("nvcc")
REGISTERS = 65536  # of an SM, from Ampere to Blackwell
ARCHITECTURES = (80, 90, 100, 120)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


class Kernel(NamedTuple):
    name: str
    architecture: int
    registers: int
    stack: int
    local: int


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Kernel]]:
    made = installed() or compile_into(tmp_path_factory.mktemp("compiled"))
    kernels = []
    for part in cuobjdump("--dump-resource-usage", str(made)).split("arch = sm_")[1:]:
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        architecture = int(part.split()[0])
        kernels += [Kernel(name, architecture, *map(int, numbers)) for name, *numbers in found]
    return made, kernels


def installed() -> Path | None:
    """The extension, if it has kernels for all architectures and no source is younger."""
    built = "" if _extension.C is None else _extension.C.cuda_architectures
    if not set(map(str, ARCHITECTURES)) <= set(re.findall(r"\d+", built)):
        return None
    made = Path(_extension.C.__file__)
    youngest = max(path.stat().st_mtime for path in CSRC.rglob("*.*"))
    return made if made.stat().st_mtime >= youngest else None


def compile_into(folder: Path) -> Path:
    command = [str(NVCC), "-std=c++17", "-O3", "--threads=2", "-c", "-o", str(folder / "engine.o")]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    done = subprocess.run([*command, str(CSRC / "cuda/engine.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "engine.o"


def test_every_kernel_is_there(compiled: tuple[Path, list[Kernel]]) -> None:
    for architecture in ARCHITECTURES:
        names = [kernel.name for kernel in compiled[1] if kernel.architecture == architecture]
        # 6 norms to read, 4 on chip; combine, settle, scale, clamp; each for two sizes of table. And one more.
        assert len(names) == 2 * (6 + 4 + 4) + 1
        assert sum("clip_on_chip" in name for name in names) == 8


def test_nothing_is_in_local_memory(compiled: tuple[Path, list[Kernel]]) -> None:
    assert [k for k in compiled[1] if k.stack or k.local] == []


def test_registers_leave_room_for_the_policys_blocks(compiled: tuple[Path, list[Kernel]]) -> None:
    for kernel in compiled[1]:
        threads, blocks = policy(kernel.architecture)
        one = "clip_on_chip" in kernel.name or "5Power" in kernel.name  # on chip, and powers
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
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}", str(made))
    return {part.split(maxsplit=1)[0]: part for part in text.split("Function : ")[1:]}


def cuobjdump(*arguments: str) -> str:
    tool = shutil.which("cuobjdump") or _from_triton()
    if tool is None:
        pytest.skip("cuobjdump was not found, in the CUDA toolkit or in Triton")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _from_triton() -> str | None:
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton is here")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(tool) if tool.exists() else None
