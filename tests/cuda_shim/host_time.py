"""`python -m tests.cuda_shim.host_time`: what the host takes for a call, all done but the launches themselves.

Builds the extension against the shim and has every launch return at once, so that this runs without a GPU. What a GPU
adds: cudaLaunchKernelEx, and memory from torch's CUDA allocator in place of the CPU's. Exits with 1 over the budget.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUDGET, BUDGET_PER_TENSOR = 8.0, 0.12  # microseconds
ROOT = Path(__file__).parents[2]


def measure() -> int:
    import torch

    import fusedclip
    from fusedclip import backends

    cuda, cpu = backends._BY_NAME["cuda"], backends._BY_NAME["cpu"]
    # As on a GPU, where nothing has to be forced: the CPU engine's sweep leaves the list to others.
    backends._chosen[torch.device("cpu"), frozenset([torch.float32])] = cuda
    vars(cpu)["clip_list_"] = lambda items, attribute, p, *more: backends.cpu._C.gather(items, attribute, p)
    calls = vars(cuda)["clip_"] = Counted(cuda.clip_)
    over = 0
    print("tensors  median us  budget us")
    for tensors in (1, 10, 100, 1000, 1536):
        parameters = [torch.nn.Parameter(torch.ones(16)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.ones(16)
        random.Random(0).shuffle(parameters)  # as allocators leave them: the check for overlap then has to sort
        times = []
        for _ in range(1000):
            start = time.perf_counter_ns()
            fusedclip.clip_grad_norm_(parameters, 1.0)
            times.append((time.perf_counter_ns() - start) / 1e3)
        median, budget = statistics.median(times[100:]), BUDGET + BUDGET_PER_TENSOR * tensors
        over += median > budget
        print(f"{tensors:7}  {median:9.2f}  {budget:9.2f}")
    assert calls.count == 5 * 1000, "another engine was measured"
    return int(over > 0)


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **keywords)


def main() -> int:
    if "FUSEDCLIP_SHIM_NO_LAUNCHES" in os.environ:
        return measure()
    from . import build

    with tempfile.TemporaryDirectory() as folder:
        for package in ("fusedclip", "tests"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=ignored)
        build.extension(Path(folder) / "fusedclip", "-O3")
        environment = {**os.environ, "FUSEDCLIP_SHIM_NO_LAUNCHES": "1", "PYTHONPATH": folder}
        command = [sys.executable, "-m", "tests.cuda_shim.host_time"]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
