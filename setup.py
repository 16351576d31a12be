"""Builds `fusedclip._C` by calling CMake; everything else is in pyproject.toml.

Environment: FUSEDCLIP_EXTENSION=0 installs without the extension; FUSEDCLIP_CUDA=0 builds it without the CUDA half;
FUSEDCLIP_CUDA_ARCHS="90" chooses compute capabilities; FUSEDCLIP_LINEINFO=1 keeps source lines in the kernels for
profilers; FUSEDCLIP_SANITIZE="address,undefined" is for the tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OPTIONS = ("FUSEDCLIP_CUDA", "FUSEDCLIP_CUDA_ARCHS", "FUSEDCLIP_LINEINFO", "FUSEDCLIP_SANITIZE")
FAILED = """
fusedclip: building the C++ extension failed: {reason}
  It needs a C++17 compiler, CMake >= 3.18 and ninja. On Debian or Ubuntu: apt-get install g++; on Fedora:
  dnf install gcc-c++; on macOS: xcode-select --install. CMake and ninja come with pip.
  FUSEDCLIP_CUDA=0 leaves out the CUDA half.
  FUSEDCLIP_EXTENSION=0 installs without the extension: gradients on the CPU are then served by the reference
  engine, in plain torch.
"""


class CMakeBuild(build_ext):
    """One CMake target, built by ninja, placed where setuptools wants the module."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # What the last build found may be gone (pip builds in throw-away environments) or not wanted any more.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        try:
            import pybind11

            configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"]
            configure += [f"-DFUSEDCLIP_VERSION={self.distribution.get_version()}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={module.parent}"]
            configure += [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)
            if not self.inplace:
                # Tests and benchmarks run in the checkout, where Python finds this folder before the installed one.
                # What is there may be in use: written into, it would take a running process down.
                (ROOT / "fusedclip" / module.name).unlink(missing_ok=True)
                shutil.copy2(module, ROOT / "fusedclip")
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            raise SystemExit(FAILED.format(reason=error)) from None


wanted = os.environ.get("FUSEDCLIP_EXTENSION", "1") != "0"
if not wanted:
    for left_over in (ROOT / "fusedclip").glob("_C.*.so"):
        left_over.unlink()
sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]  # listed for the source distribution
setup(
    ext_modules=[Extension("fusedclip._C", [], depends=sources)] if wanted else [],
    cmdclass={"build_ext": CMakeBuild},
)
