"""What is timed: the operations with the limit that each is given, and named lists of cases."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product

from benchmarks.gradients import MIXED
from benchmarks.workloads import HOST_COUNTS, MODELS, SMALL_LISTS

# Exact in fp32, bf16 and fp16, and close to one standard deviation of the gradients: clips about a third of them.
CLIP_VALUE = 2.0**-10
# Limits over the norm. Far from 1, so that no error of a contender's norm decides whether it clips; the coefficient is
# not a power of two, by which any engine would multiply without rounding.
LOOSE, TIGHT = 2.0, 0.6180339887
Names = Collection[str]
FP32, BF16, FP16 = "float32", "bfloat16", "float16"
DTYPES = (FP32, BF16, FP16)


class Operation(str, Enum):
    """One way of calling the library."""

    NOT_CLIPPED = "not clipped"
    CLIPPED = "clipped"
    VALUE = "clipped by value"
    PER_TENSOR_NORMS = "per-tensor norms"
    NORM = "norm"

    @property
    def writes(self) -> bool:
        """True if the gradients must get their old values back before the next call."""
        return self in (Operation.CLIPPED, Operation.VALUE)

    def limit(self, norm: float) -> float:
        """The limit handed to the call, for gradients of this norm."""
        if self is Operation.VALUE:
            return CLIP_VALUE
        return norm * (TIGHT if self is Operation.CLIPPED else LOOSE)


BOTH = (Operation.NOT_CLIPPED, Operation.CLIPPED)
OTHER = (Operation.VALUE, Operation.PER_TENSOR_NORMS)


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    workload: str
    dtype: str
    operation: Operation

    def __str__(self) -> str:
        return f"{self.workload} {self.dtype} {self.operation.value}"


@dataclass(frozen=True)
class Suite:
    """Cases, and for each of them how long its contenders take turns."""

    cases: tuple[Case, ...]
    seconds_per_row: float
    # Leave these out: slow ones would cost a suite most of its rounds and tell nothing new there.
    without: tuple[str, ...] = ()


Part = tuple[Names, Names, Collection[Operation]]


def suite(seconds_per_row: float, *parts: Part, without: tuple[str, ...] = ()) -> Suite:
    """Of each part its workloads, each in all the dtypes, each with all the operations."""
    return Suite(tuple(Case(*one) for part in parts for one in product(*part)), seconds_per_row, without)


def host(elements: int) -> Part:
    return [f"host-{count}x{elements}" for count in HOST_COUNTS], [FP32], [Operation.NOT_CLIPPED]


SLOW = ("torch loop", "fusedclip reference")

SUITES: dict[str, Suite] = {
    "quick": suite(
        2.0,
        (["gpt2"], [FP32, BF16], BOTH),
        (["gpt2"], [FP16], [Operation.NOT_CLIPPED]),
        (["resnet50"], [FP32], BOTH),
        (["lora-8b"], [BF16], BOTH),
        (["1000x256", "300x4096"], [FP32], [Operation.NOT_CLIPPED]),
        (["5000x64"], [FP32], [Operation.CLIPPED]),
        without=SLOW,
    ),
    "default": suite(
        6.0,
        (["gpt2"], DTYPES, BOTH),
        (["llama3-8b-shard", "moe-128-shard", "lora-8b"], [BF16], BOTH),
        (["resnet50", "vit-b16", "2000x1024"], [FP32], BOTH),
        (["gpt2", "2000x1024"], [FP32], OTHER),
    ),
    "claims": suite(
        6.0,
        (["gpt2"], DTYPES, BOTH),
        (["1000x256", "300x4096"], [FP32], [Operation.NOT_CLIPPED]),
        (["5000x64"], [FP32], [Operation.CLIPPED]),
        (["one-2^24", "one-2^26"], [FP32], [Operation.NOT_CLIPPED]),
        host(elements=8),
        without=SLOW,
    ),
    "gpu": suite(
        1.2,
        (["gpt2-xl", "llama3-8b-shard"], [FP32, BF16], [Operation.NORM, *BOTH]),
        (["moe-128-shard", "lora-8b", "resnet50", "vit-b16"], [FP32, BF16], BOTH),
        (["gpt2"], [FP32, FP16], BOTH),
        (["gpt2-xl"], [BF16], OTHER),
        ([f"100x{size}" for size in SMALL_LISTS], [FP32], [Operation.CLIPPED]),
        (["2000x1024"], [FP32], BOTH),
        (["500x450000"], [MIXED], [Operation.CLIPPED]),
        (["one-1.536e9"], [BF16], BOTH),
        host(elements=8),
        without=SLOW,
    ),
    # With torch's loop, whose launches a stream can't queue for more tensors, and with torch.compile, which takes half
    # a minute for each list of shapes.
    "gpu-everyone": suite(2.4, (["gpt2"], [BF16], BOTH), without=("fusedclip reference",)),
    "host": suite(3.0, host(elements=8), host(elements=256)),
    "models": suite(6.0, ([*MODELS, "2000x1024"], DTYPES, BOTH), without=("fusedclip reference",)),
}


def select(
    name: str, dtypes: Names = (), workloads: Names = (), quick: bool = False, among: Mapping[str, Suite] = SUITES
) -> Suite:
    """The suite of that name, in these dtypes instead of its own, for these workloads only, in a third of the time."""
    suite = among[name]
    named = [case for case in suite.cases if not workloads or case.workload in workloads]
    if not named:
        has = sorted({case.workload for case in suite.cases})
        raise ValueError(f"suite {name!r} has none of these workloads; it has {', '.join(has)}")
    kept = dict.fromkeys(replace(case, dtype=dtype) for case in named for dtype in dtypes or (case.dtype,))
    return replace(suite, cases=tuple(kept), seconds_per_row=suite.seconds_per_row / (3 if quick else 1))
