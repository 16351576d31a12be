"""How the kernels are shaped: one fixed configuration per kind of device.

A pass that is bound by memory needs enough bytes in flight: about 3.4 TB/s x 0.7 us = 2.3 MB on an H100, 18 KB per
multiprocessor. Every program has one step in flight and then works on it, so that a few times as much are kept going.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tuning:
    chunk_bytes: int = 64 * 1024  # one entry (8 bytes) in the table, one reduction over the program's threads
    step_bytes: int = 16 * 1024  # 8 loads of 16 bytes for each of 128 threads
    num_warps: int = 4
    programs_per_processor: int = (
        4  # all resident at once: a program that waits for another's end would double the time
    )
    limits: tuple[tuple[str, int], ...] = ()  # the compiler's options that make room for that many

    def __post_init__(self) -> None:
        if self.chunk_bytes % self.step_bytes or self.step_bytes & (self.step_bytes - 1) or self.step_bytes < 4096:
            raise ValueError(f"{self}: a chunk is a whole number of steps, and a step a power of two from 4096 bytes")

    def options(self) -> dict[str, int | bool]:
        """For the compiler.

        Without fused multiply-adds the coefficient is that of norms.py to the bit, on every version of Triton (their
        defaults differ). Reading is bound by memory: the extra instructions come for free.
        """
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **dict(self.limits)}


# Not measured on any device yet: the arithmetic above, and what tests/test_triton_offline.py sees of registers.
# On an MI300 a program of 4 waves is one wave on each SIMD, and four of them leave each 128 of 512 registers.
DEFAULT = Tuning()
# 5 x 128 threads x 96 = 61,440 of 65,536 registers. Without the limit ptxas aims at 80 or 64 at times, and spills.
NVIDIA = Tuning(programs_per_processor=5, limits=(("maxnreg", 96),))
# The interpreter pays per operation and hardly per element. Three programs, so that they share chunks unevenly.
INTERPRETER = Tuning(chunk_bytes=128 * 1024, step_bytes=64 * 1024, programs_per_processor=3)


@cache
def tuning_for(device: torch.device) -> Tuning:
    if device.type == "cpu":
        return INTERPRETER
    return NVIDIA if device.type == "cuda" and torch.version.hip is None else DEFAULT


@cache
def programs_for(device: torch.device) -> int:
    """The size of the grid."""
    processors = 1
    if device.type != "cpu":
        properties = torch.get_device_module(device).get_device_properties(device)
        processors = properties.max_compute_units if device.type == "xpu" else properties.multi_processor_count
    return processors * tuning_for(device).programs_per_processor
