"""Compiles csrc/cuda for the host, against the shim's CUDA words: as a test driver, or as the whole extension."""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

SHIM = Path(__file__).parent
CSRC = SHIM.parents[1] / "csrc"
COMPILER = shutil.which("g++")
# 64 threads a block, 2 blocks an SM, 4 loads in flight (2 when writing).
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC 12 does not see that packs are loaded and used under one condition
FLAGS += ["-DFUSEDCLIP_LAUNCH_POLICIES={0,64,2,4,2}", f"-I{SHIM}", f"-I{CSRC}"]
FIBERS = ["-DFUSEDCLIP_SHIM_FIBERS"]


def driver(folder: Path, sanitizers: str) -> Path:
    """The test driver under e.g. "address,undefined"; races show among threads alone."""
    # Under ASan and UBSan -O0 compiles in 21 s for 35, and runs in the same 28.
    how = ["-O1"] if sanitizers == "thread" else ["-O0", *FIBERS]
    flags = [*FLAGS, *how, "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = [*(CSRC / "cuda" / name for name in ("engine.cu", "update.cu", "device.cpp")), SHIM / "driver.cpp"]
    return _link(folder / "driver", sources, flags)


def extension(folder: Path, optimization: str = "-O1") -> Path:
    """`_C` with a CUDA half that runs on the host. Optimized little: tests compile for longer than they run."""
    import pybind11

    flags = [*FLAGS, *FIBERS, optimization, "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
    flags += ["-DFUSEDCLIP_ISA=baseline", "-DFUSEDCLIP_WITH_CUDA", '-DFUSEDCLIP_CUDA_ARCHITECTURES="host"']
    flags += [f'-DFUSEDCLIP_VERSION="{version("fusedclip")}"']
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    bindings = folder / "bindings.cpp"  # in one piece: 10 s instead of 30, nearly all of them for the same headers
    bindings.write_text("".join(f'#include "{path}"\n' for path in sorted(CSRC.glob("*.cpp"))))
    sources = [path for kind in ("cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu") for path in sorted(CSRC.glob(kind))]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return _link(folder / f"_C{suffix}", [bindings, *sources], flags, shared=True)


def _link(target: Path, sources: list[Path], flags: list[str], *, shared: bool = False) -> Path:
    assert COMPILER is not None
    objects = [target.parent / f"{source.stem}_{i}.o" for i, source in enumerate(sources)]
    commands = [
        [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    # OpenMP is compiled in and not linked: torch has brought the runtime (see csrc/cpu/parallel.h).
    how = ["-shared"] if shared else [flag for flag in flags if flag.startswith("-fsanitize")]
    _run([COMPILER, *how, *map(str, objects), "-o", str(target), "-pthread"])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
