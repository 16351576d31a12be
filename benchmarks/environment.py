"""Where and on what a result was made."""

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def require(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        build = "is a build without CUDA" if torch.version.cuda is None else "finds none"
        raise ValueError(f"there is no GPU here that torch can use: torch {torch.__version__} {build}")


def describe(device: torch.device) -> dict[str, Any]:
    require(device)
    head = _output_of("git", "rev-parse", "--verify", "HEAD")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions | {name: version(name) for name in ("torch", "numpy", "triton", "fusedclip")},
        # What was measured, and whether tracked files differ from it.
        "commit": {"hash": head, "dirty": bool(_output_of("git", "status", "--porcelain", "-uno")) if head else None},
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory": properties.total_memory,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's marketing name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*\S)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def version(package: str) -> str:
    return next((one.version for one in metadata.distributions(name=package)), "not installed")


def _output_of(*command: str) -> str | None:
    """What the command prints, None where it is not to be had."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
