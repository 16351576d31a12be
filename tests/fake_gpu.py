"""A GPU that is not there: torch's CUDA functions as far as the benchmarks ask them, and what is made on it made on the
host. Functions refuse what the real ones refuse, so that a command that would fail on a GPU fails here.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class OnTheHost(TorchFunctionMode):
    """Whatever asks for the GPU's memory gets the host's."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        found = {name: _host(value) for name, value in (kwargs or {}).items()}
        return function(*map(_host, args), **found)


def _host(value: Any) -> Any:
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_gpu or (isinstance(value, str) and value.startswith("cuda")) else value


class Event:
    """Of the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3  # ms


def set_device(device: Any) -> None:
    """torch's own check of its argument: a device without a number is refused."""
    index = torch.cuda._utils._get_device_index(device)
    if index != 0:
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}")


PROPERTIES = SimpleNamespace(
    name="Fake GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20
)
FUNCTIONS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": set_device,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "is_current_stream_capturing": lambda: False,  # asked by optimizers where torch is built with CUDA
    "Event": Event,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
}


@contextmanager
def fake_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, OnTheHost():
        for name, function in FUNCTIONS.items():
            patch.setattr(torch.cuda, name, function)
        yield
