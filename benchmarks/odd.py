"""Lists with something odd in them and the other functions, each beside the plain call on the plain list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedclip
from benchmarks import workloads
from benchmarks.contenders import gradients_of
from benchmarks.gradients import SPREAD, Gradients
from benchmarks.suites import BOTH, CLIP_VALUE, FP32, Case, Operation, Suite
from benchmarks.timing import Entry, nothing

PLAIN = "1000x256"
# Of parameters, the limit for their norm taken together, and that norm.
Call = Callable[[Sequence[Parameter], float, Tensor], object]


def clip(parameters: Sequence[Parameter], limit: float, norm: Tensor) -> object:
    return fusedclip.clip_grad_norm_(parameters, limit)


def clip_each(parameters: Sequence[Parameter], limit: float, norm: Tensor) -> object:
    return fusedclip.clip_grad_norm_per_tensor_(parameters, limit / math.sqrt(len(parameters)))


def with_gradient(gradient: Tensor) -> Parameter:
    parameter = Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    return parameter


def strided(like: Tensor) -> Parameter:
    return with_gradient(like.new_empty(2 * like.numel())[::2])


def complex_(like: Tensor) -> Parameter:
    return with_gradient(torch.empty(like.numel() // 2, dtype=torch.complex64, device=like.device))


@dataclass(frozen=True)
class Odd:
    """`call` on the plain list, in whose middle `instead` has replaced one parameter and to which `twice` are added."""

    call: Call = clip
    instead: Callable[[Tensor], Parameter] | None = None
    twice: int = 0
    operations: tuple[Operation, ...] = BOTH


NOT_CLIPPED, CLIPPED = BOTH
ODD: dict[str, Odd] = {
    "one strided gradient": Odd(instead=strided),
    "one complex gradient": Odd(instead=complex_),
    "per-tensor clip, one without a gradient": Odd(clip_each, instead=lambda like: Parameter(torch.empty_like(like))),
    "one listed twice": Odd(twice=1),
    "all listed twice": Odd(twice=1_000),
    "per-tensor clip": Odd(clip_each),
    "get_per_tensor_norms": Odd(
        lambda parameters, limit, norm: fusedclip.get_per_tensor_norms(gradients_of(parameters)),
        operations=(NOT_CLIPPED,),
    ),
    "clip_grads_with_norm_": Odd(fusedclip.clip_grads_with_norm_),
    "error_if_nonfinite=True": Odd(
        lambda parameters, limit, norm: fusedclip.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
    ),
    "clip_grad_value_": Odd(
        lambda parameters, limit, norm: fusedclip.clip_grad_value_(parameters, CLIP_VALUE), operations=(CLIPPED,)
    ),
}
SUITE = Suite(
    tuple(Case(name, FP32, operation) for name, one in ODD.items() for operation in one.operations),
    seconds_per_row=2.0,
)


def entries(case: Case, device: torch.device, seed: int) -> list[Entry]:
    """The odd call, the plain one, and where one gradient is odd the odd call on that gradient alone."""
    odd = ODD[case.workload]
    gradients = Gradients(workloads.load(PLAIN, 4), FP32, device, seed)
    plain = gradients.parameters
    listed, alone = list(plain), []
    if odd.instead is not None:
        middle = len(plain) // 2
        listed[middle] = odd.instead(gradients.tensors[middle])
        alone = [listed[middle]] if listed[middle].grad is not None else []
    listed += plain[: odd.twice]
    norm = torch.nn.utils.get_total_norm(gradients.tensors)

    def restore() -> None:
        gradients.restore()
        for gradient in gradients_of(alone):
            gradient.fill_(SPREAD)

    restore()
    before = restore if case.operation.writes else nothing
    own = math.hypot(*(float(gradient.norm()) for gradient in gradients_of(alone)))
    limit, limit_alone = case.operation.limit(float(norm)), case.operation.limit(own)
    # The plain list of "per-tensor clip, one without" is clipped per tensor too.
    beside = odd.call if odd.instead is not None else clip
    found = [
        Entry("call", partial(odd.call, listed, limit, norm), before),
        Entry("plain", partial(beside, plain, limit, norm), before),
    ]
    return found + [Entry("alone", partial(odd.call, alone, limit_alone, norm), before)] * bool(alone)
