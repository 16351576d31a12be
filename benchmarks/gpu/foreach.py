"""How many tensors torch's foreach path takes in one launch: the table of them is a kernel argument, 4 KB in builds for
older CUDA versions, up to 32 KB since CUDA 12.1.
"""

import ctypes
from collections.abc import Callable

import torch

MOST = 4096


def launch_capacity(device: torch.device) -> int | None:
    """The most tensors of eight elements that `torch._foreach_mul_` multiplies in one kernel; None if beyond MOST."""
    tensors = [torch.ones(8, device=device) for _ in range(MOST)]
    torch._foreach_mul_(tensors, 1.0)
    torch.cuda.synchronize()
    return most_in_one(lambda count: launches(lambda: torch._foreach_mul_(tensors[:count], 1.0)))


def most_in_one(launches: Callable[[int], int]) -> int | None:
    """The largest count up to MOST for which `launches` is 1."""
    if (alone := launches(1)) != 1:
        raise RuntimeError(f"one tensor took {alone} launches")
    if launches(MOST) == 1:
        return None
    one, more = 1, MOST
    while more - one > 1:
        middle = (one + more) // 2
        one, more = (middle, more) if launches(middle) == 1 else (one, middle)
    return one


def launches(call: Callable[[], object]) -> int:
    """Nodes of the graph that records the call: a profiler can lose launches, and slows what is measured after it."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    nodes = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    error = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes))
    if error:
        raise RuntimeError(f"cuGraphGetNodes: error {error}")
    return nodes.value
