"""The ways to clip sharded gradients that are compared. Each returns the norm of all shards, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fusedclip

Parameters = list[nn.Parameter]
Clip = Callable[[Parameters, float], Tensor]


def torch_dtensors(parameters: Parameters, max_norm: float) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor()  # type: ignore[attr-defined, no-any-return]


def torch_local(parameters: Parameters, max_norm: float) -> Tensor:
    """What frameworks write by hand: torch's foreach functions on the local tensors, one all-reduce of the square."""
    local = [parameter.grad._local_tensor for parameter in parameters]  # type: ignore[union-attr]
    square = torch.nn.utils.get_total_norm(local).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def ours(parameters: Parameters, max_norm: float) -> Tensor:
    return fusedclip.clip_grad_norm_(parameters, max_norm)


def ours_patched(parameters: Parameters, max_norm: float) -> Tensor:
    with fusedclip.patch_torch():
        return torch_dtensors(parameters, max_norm)


def all_reduce_alone(parameters: Parameters, max_norm: float) -> Tensor:
    """The floor: three numbers to every rank."""
    numbers = torch.zeros(3, dtype=torch.float64, device=parameters[0].device)
    dist.all_reduce(numbers)
    return numbers[0]


CLIPS: dict[str, Clip] = {
    "torch, DTensors": torch_dtensors,
    "torch, local tensors": torch_local,
    "fusedclip": ours,
    "fusedclip, patched torch": ours_patched,
    "one all-reduce": all_reduce_alone,
}
FLOOR = "one all-reduce"


@contextmanager
def counted() -> Iterator[list[str]]:
    """The name of each collective that is made inside, functional or not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # it calls what we are to see
            if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_wrap")):
                made.append(str(func))
            return func(*args, **(kwargs or {}))

    def plain(*args: Any, **kwargs: Any) -> Any:
        made.append("all_reduce")
        return original(*args, **kwargs)

    original = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", plain), Watch():  # type: ignore[no-untyped-call]
        yield made
