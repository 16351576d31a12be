"""How many tensors torch's foreach path takes in one launch: the table of them is a kernel argument, 4 KB in builds for
older CUDA versions, up to 32 KB since CUDA 12.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MOST = 4096


def launch_capacity(device: torch.device) -> int | None:
    """The most tensors of eight elements that `torch._foreach_mul_` multiplies in one kernel; None if it is beyond
    MOST, or if the profiler sees no kernels.
    """
    tensors = [torch.ones(8, device=device) for _ in range(MOST)]
    torch._foreach_mul_(tensors, 1.0)
    return most_in_one(lambda count: kernels(lambda: torch._foreach_mul_(tensors[:count], 1.0)))


def most_in_one(launches: Callable[[int], int]) -> int | None:
    """The largest count up to MOST for which `launches` is 1."""
    if launches(1) != 1 or launches(MOST) == 1:
        return None
    one, more = 1, MOST
    while more - one > 1:
        middle = (one + more) // 2
        one, more = (middle, more) if launches(middle) == 1 else (one, middle)
    return one


def kernels(call: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
