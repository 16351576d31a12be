"""What nvcc makes of the kernels, without a GPU: nothing in local memory, 16-byte loads and stores, as many of them on
their way as planned, resident blocks, code that an instruction cache can hold.

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
pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc was not found"), pytest.mark.xdist_group("nvcc")]


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
    """With CMakeLists.txt's options."""
    objects = [folder / "engine.o", folder / "update.o"]
    for made, options in zip(objects, ([], ["-fmad=false"]), strict=True):
        architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
        source = CSRC / "cuda" / f"{made.stem}.cu"
        run_nvcc("-std=c++17", "-O3", "--threads=2", *architectures, *options, "-c", "-o", str(made), str(source))
    run_nvcc("--lib", "-o", str(folder / "engine.a"), *map(str, objects))
    return folder / "engine.a"


def run_nvcc(*arguments: str) -> None:
    done = subprocess.run([str(NVCC), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_is_there(compiled: tuple[Path, list[Kernel]]) -> None:
    for architecture in ARCHITECTURES:
        names = [kernel.name for kernel in compiled[1] if kernel.architecture == architecture]
        # 6 norms to read, 4 on chip; statistics, combine, settle, scale, clamp; for three sizes of table. And one more.
        # Of each of 5 rules that move parameters two, for two sizes of table.
        assert len(names) == 3 * (6 + 4 + 5) + 1 + 2 * 5 * 2
        assert sum("clip_on_chip" in name for name in names) == 12


def test_nothing_is_in_local_memory(compiled: tuple[Path, list[Kernel]]) -> None:
    assert [k for k in compiled[1] if k.stack or k.local] == []


def test_registers_leave_room_for_the_policys_blocks(compiled: tuple[Path, list[Kernel]]) -> None:
    for kernel in compiled[1]:
        threads, blocks = policy(kernel.architecture)[:2]
        one = "clip_on_chip" in kernel.name or "5Power" in kernel.name  # on chip, and powers
        assert kernel.registers * threads * (1 if one else blocks) <= REGISTERS, kernel


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda number: f"sm_{number}")
def assembly(request: pytest.FixtureRequest, compiled: tuple[Path, list[Kernel]]) -> tuple[int, dict[str, list[str]]]:
    """The instructions of each kernel."""
    text = cuobjdump("-sass", "-arch", f"sm_{request.param}", str(compiled[0]))
    parts = {part.split(maxsplit=1)[0]: part for part in text.split("Function : ")[1:]}
    found = {name: re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]*;)", part) for name, part in parts.items()}
    assert len(found) == len(compiled[1]) / len(ARCHITECTURES)
    return request.param, found


def test_packs_are_moved_by_16_byte_instructions(assembly: tuple[int, dict[str, list[str]]]) -> None:
    for name, code in assembly[1].items():
        text = "\n".join(code)
        assert not re.search(r"\b(LDL|STL)\b", text), name
        if "on_chip" in name:
            assert re.search(r"LDGSTS\S*\.128", text), name  # global memory to shared, past the registers
            assert "LDS.128" in text, name
        elif "update_kernel" in name:
            assert text.count("LDG.E.128") >= streams(name), name  # of fp32; of a dtype half as wide 8 bytes
            assert text.count("STG.E.128") >= streams(name) - 1, name
        elif "read_kernel" in name or "stats" in name or "clamp" in name or "scale_kernel" in name:
            assert text.count("LDG.E.128") >= 4, name
        if "clamp" in name or "scale_kernel" in name or "on_chip" in name:
            assert text.count("STG.E.128") >= (1 if "on_chip" in name else 4), name


def test_loads_are_on_their_way_before_the_first_is_used(assembly: tuple[int, dict[str, list[str]]]) -> None:
    """In each dtype's loop, as many as the policy says: what hides the memory's latency."""
    architecture, kernels = assembly
    unroll, write_unroll = policy(architecture)[2:]
    for name, code in kernels.items():
        one_by_one = "NormE3" in name or "PowerE" in name or "MinE" in name  # padding is not neutral, or is arithmetic
        if "read_kernel" in name and not one_by_one:
            assert sum(group >= unroll for group in groups_of_loads(code)) >= 4, name
        if "stats" in name:
            assert sum(group >= (unroll + 1) // 2 for group in groups_of_loads(code)) >= 4, name
        if "clamp" in name or "scale_kernel" in name:
            assert sum(group >= write_unroll for group in groups_of_loads(code)) >= 4, name


EARLY = ("settle_and_scale", "combine_slots", "norm_kernel", "update_kernel")  # Start::kEarly


def test_kernels_that_start_early_wait_before_they_touch_memory(assembly: tuple[int, dict[str, list[str]]]) -> None:
    """For the launch before them to end. The host shim, whose launches take turns, would not miss it."""
    architecture, kernels = assembly
    for name, code in kernels.items():
        waits = [place for place, instruction in enumerate(code) if instruction.startswith("ACQBULK")]
        touches = [place for place, instruction in enumerate(code) if re.search(r"\b(LDG|STG|LD|ST)\.", instruction)]
        if architecture >= 90 and any(part in name for part in EARLY):
            assert waits[0] < touches[0], name
        else:
            assert waits == [], name


def test_updates_wait_for_no_stream_before_the_others(assembly: tuple[int, dict[str, list[str]]]) -> None:
    """All of a step's loads are on their way before the first is used; of five some wait where registers are short."""
    for name, code in assembly[1].items():
        if "update_kernel" in name:
            assert max(groups_of_loads(code)) >= min(streams(name), 5 if assembly[0] < 100 else 3), name


def streams(update_kernel: str) -> int:
    """Value, gradient and states."""
    states = {"AdamWRuleILb0E": 2, "AdamWRuleILb1E": 3, "MomentumE0E": 0, "MomentumE1E": 1, "MomentumE2E": 1}
    return 2 + next(count for rule, count in states.items() if rule in update_kernel)


def groups_of_loads(code: list[str]) -> list[int]:
    """How many 16-byte loads are issued before the result of any of them is read, group by group."""
    groups, pending = [], set[int]()
    loads = 0
    for instruction in code:
        load = re.search(r"LDG\.E\.128\S* R(\d+), (.*)", instruction)
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", load[2] if load else instruction)}
        if pending & used:
            groups.append(loads)
            pending, loads = set(), 0
        if load:
            first = int(load[1])
            pending |= set(range(first, first + 4))
            loads += 1
    return [*groups, loads]


INSTRUCTION = 16  # bytes
# An SM's first instruction cache holds 128 KB on Hopper, of which a kernel touches the part of its dtypes.
MOST_CODE = {"clip_on_chip": 32, "norm_kernel": 16, "combine_slots": 16, "read_kernel": 64, "": 64}  # KB


def test_code_fits_instruction_caches(assembly: tuple[int, dict[str, list[str]]]) -> None:
    for name, code in assembly[1].items():
        if "Power" in name:
            continue  # fp64 logarithms of every element: nothing about it is short
        most = next(size for part, size in MOST_CODE.items() if part in name)
        assert len(code) * INSTRUCTION <= most * 1024, (name, len(code) * INSTRUCTION)


def policy(architecture: int) -> tuple[int, ...]:
    """(threads, blocks per SM, loads in flight, and of a write pass) in the table."""
    text = (CSRC / "cuda/launch_policy.h").read_text()
    row = re.search(rf"\{{{architecture}, (\d+), (\d+), (\d+), (\d+)\}}", text)
    assert row is not None
    return tuple(map(int, row.groups()))


def cuobjdump(*arguments: str) -> str:
    tool = shutil.which("cuobjdump") or _from_triton()
    if tool is None:
        pytest.skip("cuobjdump was not found, in the CUDA toolkit or in Triton")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _from_triton() -> str | None:
    triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton is here")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(tool) if tool.exists() else None
