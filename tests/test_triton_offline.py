"""What the Triton kernels are compiled to, for GPUs that are not here: wide loads and stores, no spills, NaN kept."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedclip import dtypes
from fusedclip.backends.triton import kernels, norms, tiles, tuning, update, update_kernels

from .conftest import ALL, EXAMPLES

NVIDIA = [80, 90, 100]
TARGETS = [*(f"sm_{arch}" for arch in NVIDIA), "gfx942"]
NORMS = {name.upper(): number for name, number in norms.NUMBERS.items()}
DTYPES = {dtypes.name_of(dtype).upper(): code for dtype, code in tiles.CODES.items()}
DTYPES["MIXED"] = sum(DTYPES.values())
POINTERS = {
    "table": "*i64", "partials": "*fp64", "out": "*fp64", "coefs": "*fp64", "norm_out": "*fp32", "coef_out": "*fp64",
    "max_norm_on_device": "*fp32", "multiplier": "*fp32", "p": "fp64", "bound": "fp64", "max_norm": "fp64",
    "prepared": "*fp64", "coef": "*fp64", "skip": "*fp32", "lr_on_device": "*fp64", "lr": "fp64", "second": "fp64",
    "third": "fp64", "fourth": "fp64", "fifth": "fp64",
}  # fmt: skip
THREADS = 128
# What a norm adds is the same on all of NVIDIA's: an ordinary run compiles everything for one architecture, and for the
# others, of the norms the one of every step and the largest, of the dtypes the kernel that has the code of all.
USUAL = ("sm_90", "gfx942"), ("TWO", "POWER")
REST = f"FUSEDCLIP_EXAMPLES={ALL} compiles it, as .ci/run does"


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.fixture
def unless_alike(target: str, dtypes: str) -> None:
    if target not in USUAL[0] and dtypes != "MIXED" and EXAMPLES < ALL:
        pytest.skip(REST)


def tuning_of(target: str) -> tuning.Tuning:
    return tuning.DEFAULT if target == "gfx942" else tuning.NVIDIA


def compiled(kernel: Any, target: str, shaped: tuning.Tuning | None = None, **constants: object) -> dict[str, Any]:
    """The kernel's assembly, compiled with the options that a launch gives."""
    shaped = shaped or tuning_of(target)
    shape = {"TILE_BYTES": shaped.tile_bytes, "STEP_BYTES": shaped.step_bytes}
    constants = {n: v for n, v in {**shape, **constants}.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in kernel.arg_names}
    gpu = GPUTarget("hip", target, 64) if target == "gfx942" else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, signature, constants, {})
    return dict(triton.compile(source, target=gpu, options=shaped.options()).asm)


def count_wide(asm: dict[str, Any], target: str, what: str) -> int:
    """Instructions that load or store 16 bytes a thread."""
    if target == "gfx942":
        return len(re.findall(rf"\b(?:global|buffer|flat)_{what}_dwordx4\b", asm["amdgcn"]))
    word = {"load": "ld", "store": "st"}[what]
    return len(re.findall(rf"\b{word}\.global(?:\.\w+)*\.(?:v4\.[bf]32|v2\.[bf]64)\b", asm["ptx"]))


def check_registers(asm: dict[str, Any], target: str, tmp_path: Path, shaped: tuning.Tuning = tuning.NVIDIA) -> None:
    """No spills, and registers that let all programs of the grid be resident at once."""
    if target == "gfx942":
        found = {n: int(v) for n, v in re.findall(r"\.(\w+):\s+(\d+)", asm["amdgcn"])}
        assert found["vgpr_spill_count"] == 0
        assert found["private_segment_fixed_size"] == 0
        assert found["vgpr_count"] <= 512 // tuning.DEFAULT.programs_per_processor
        return
    (tmp_path / "cubin").write_bytes(asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", tmp_path / "cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {n: int(v) for n, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0, usage
    granule = -(-found["REG"] // 8) * 8
    assert granule * THREADS * shaped.programs_per_processor <= 65536, usage


def wide_expected(target: str, dtypes: str) -> int:
    """Of the whole steps of one dtype: every byte of a step in 16-byte pieces."""
    threads = tuning_of(target).num_warps * (64 if target == "gfx942" else 32)
    return tuning_of(target).step_bytes // (16 * threads) * (4 if dtypes == "MIXED" else 1)


@pytest.mark.usefixtures("unless_alike")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_read(target: str, norm: str, dtypes: str, tmp_path: Path) -> None:
    if target not in USUAL[0] and norm not in USUAL[1] and EXAMPLES < ALL:
        pytest.skip(REST)
    for per_tile in (True, False):
        asm = compiled(kernels.read_kernel, target, NORM=NORMS[norm], DTYPES=DTYPES[dtypes], PER_TILE=per_tile)
        check_registers(asm, target, tmp_path)
    if norm != "POWER":
        assert count_wide(asm, target, "load") >= wide_expected(target, dtypes)
    if norm in ("MAX", "MIN") and target != "gfx942" and dtypes not in ("FLOAT64", "MIXED"):  # fp64 has no such word
        assert f"{norm.lower()}.NaN.f32" in asm["ptx"]
        assert f"{norm.lower()}.f32" not in asm["ptx"]


@pytest.mark.usefixtures("unless_alike")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_statistics(target: str, dtypes: str, tmp_path: Path) -> None:
    shaped = tuning_of(target).for_statistics()
    asm = compiled(kernels.stats_kernel, target, shaped, DTYPES=DTYPES[dtypes])
    check_registers(asm, target, tmp_path, shaped)
    assert count_wide(asm, target, "load") >= 4 * (4 if dtypes == "MIXED" else 1)
    if target != "gfx942" and dtypes not in ("FLOAT64", "MIXED"):
        assert "max.NaN.f32" in asm["ptx"]
        assert "max.f32" not in asm["ptx"]
    check_registers(compiled(kernels.per_tensor_stats_kernel, target), target, tmp_path)


@pytest.mark.usefixtures("unless_alike")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("on_device", [False, True])
def test_settle_and_scale(target: str, dtypes: str, on_device: bool, tmp_path: Path) -> None:
    optional = {} if on_device else {"max_norm_on_device": None, "multiplier": None}
    constants = {"NORM": NORMS["TWO"], "DTYPES": DTYPES[dtypes], "ZEROS": on_device, "EPS": 1e-6}
    check_write(compiled(kernels.settle_and_scale_kernel, target, **constants, **optional), target, dtypes, tmp_path)


@pytest.mark.usefixtures("unless_alike")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_scale_and_clamp(target: str, dtypes: str, tmp_path: Path) -> None:
    scale = compiled(kernels.scale_kernel, target, PER_TENSOR=1, ZEROS=True, DTYPES=DTYPES[dtypes])
    check_write(scale, target, dtypes, tmp_path)
    clamp = compiled(kernels.clamp_kernel, target, DTYPES=DTYPES[dtypes])
    check_write(clamp, target, dtypes, tmp_path)
    if target != "gfx942" and dtypes != "FLOAT64":
        assert {"min.NaN.f32", "max.NaN.f32"} <= set(re.findall(r"\bm(?:in|ax)\.\S*f32\b", clamp["ptx"]))


def check_write(asm: dict[str, Any], target: str, dtypes: str, tmp_path: Path) -> None:
    check_registers(asm, target, tmp_path)
    assert count_wide(asm, target, "load") >= wide_expected(target, dtypes)
    assert count_wide(asm, target, "store") >= wide_expected(target, dtypes)


@pytest.mark.parametrize(
    ("kind", "types", "kept"),
    [
        ("adamw", "float32 float32 float32 float32", 0),
        ("adamw", "float32 float32 bfloat16 bfloat16", 0),
        ("adamw", "bfloat16 bfloat16 float32 float32", update_kernels.SPLIT.value),
        ("adamw_amsgrad", "float16 float32 float32 float32 float32", update_kernels.WHOLE.value),
        ("adamw", "float64 float64 float64 float64", 0),
        ("sgd_nesterov", "float32 float32 float32", 0),
        ("sgd", "bfloat16 bfloat16", 0),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_updates(target: str, kind: str, types: str, kept: int, tmp_path: Path) -> None:
    places = tuple(update.PLACES[getattr(torch, name)] for name in types.split())
    shaped = tuning_of(target).for_statistics()
    step = update.step_of(shaped)
    shape = {"STREAMS": len(places) + (kept > 0) + 1, "STEP": step, "TILE": update.STEPS_PER_TILE * step}
    asm = compiled(update_kernels.update_kernel, target, shaped, KIND=kind, TYPES=places, KEPT=kept, **shape)
    check_registers(asm, target, tmp_path, shaped)
    wide = sum(name in ("float32", "float64") for name in types.split())  # of 16-bit ones, beside them, 8 bytes
    assert count_wide(asm, target, "load") >= wide
    assert count_wide(asm, target, "store") >= wide - 1
    constants = {"KIND": kind, "MAXIMIZE": False, "IN_DOUBLE": False, "STEPS": 1 if kind != "sgd" else None}
    check_registers(compiled(update_kernels.prepare_kernel, target, shaped, **constants), target, tmp_path, shaped)
    if target != "gfx942":
        assert ".ftz" not in asm["ptx"]
        assert not re.search(r"\b(fma\.rn|div\.full|sqrt\.approx)", asm["ptx"])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_finishing_kernels(target: str, norm: str, tmp_path: Path) -> None:
    for kernel in (kernels.norm_kernel, kernels.per_tensor_kernel):
        check_registers(compiled(kernel, target, NORM=NORMS[norm]), target, tmp_path)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "gfx942"])
def test_ordinary_arithmetic_keeps_subnormals_and_is_not_fused(target: str) -> None:
    read = compiled(kernels.read_kernel, target, NORM=NORMS["TWO"], DTYPES=DTYPES["FLOAT32"], PER_TILE=False)
    assert ".ftz" not in read["ptx"]
    assert not re.search(r"\bfma\.rn\.f(32|64)\b", read["ptx"])
