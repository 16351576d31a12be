"""Parameters with sharded gradients whose full tensors every rank knows, and how many all-reduces a call makes."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn import Parameter

from .. import oracle

Placements = Sequence[Any]


@dataclass
class Case:
    """A gradient: its full tensor, and where it lies (no mesh: plain, the same on all ranks)."""

    full: Tensor
    mesh: DeviceMesh | None = None
    placements: Placements = ()

    def gradient(self) -> Tensor:
        full = self.full.clone()
        if self.mesh is None:
            return full
        # Parts of a sum: they all differ, and add up to the full tensor.
        partial = [dim for dim, placement in enumerate(self.placements) if isinstance(placement, Partial)]
        summed = [p if dim not in partial else _replicate() for dim, p in enumerate(self.placements)]
        whole = distribute_tensor(full, self.mesh, summed, src_data_rank=None)
        local = whole.to_local().clone()
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        for dim in partial:
            size = self.mesh.size(dim)
            share = torch.full_like(local, 1 / size) if size == 1 else _share(local, coordinate[dim], size)
            local = local * share
            if self.placements[dim].reduce_op == "avg":
                local = local * size
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=full.shape, stride=full.stride()
        )

    def parameter(self) -> Parameter:
        gradient = self.gradient()
        parameter = Parameter(torch.zeros_like(gradient) if self.mesh is None else _without_parts(gradient))
        parameter.grad = gradient
        return parameter


def _share(like: Tensor, rank: int, size: int) -> Tensor:
    """Weights that add up to exactly 1 over the ranks: -1, then 2 / (size - 1)."""
    return torch.full_like(like, -1.0 if rank == 0 else 2.0 / (size - 1))


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _without_parts(gradient: Tensor) -> Tensor:
    """A parameter is never a partial sum."""
    assert isinstance(gradient, DTensor)
    whole = [_replicate() if p.is_partial() else p for p in gradient.placements]
    return DTensor.from_local(
        torch.zeros_like(gradient.to_local()),
        gradient.device_mesh,
        whole,
        run_check=False,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


def local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.01


def coarse(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose parts add up without rounding, in any order."""
    return random(*shape, seed=seed, dtype=torch.bfloat16).float()


@contextmanager
def all_reduces() -> Iterator[list[str]]:
    """The operation of each all-reduce that is made inside."""
    made: list[str] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, op: Any, *args: Any, **kwargs: Any) -> Any:
            statistic = "sum" if op in ("sum", dist.ReduceOp.SUM) else "max"
            made.append(statistic if tensor.dtype == torch.float64 else "parts of gradients")
            return original(tensor, op, *args, **kwargs)

        return counted

    from torch.distributed import _functional_collectives as functional

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce)),
        mock.patch.object(functional, "all_reduce", counting(functional.all_reduce)),
    ):
        yield made


def same_bits_on_all_ranks(value: Tensor) -> None:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    for other in values:
        assert torch.equal(other.view(-1).view(torch.int32), value.view(-1).view(torch.int32)), values


def assert_clipped(parameters: list[Parameter], before: list[Tensor], *coefs: float) -> None:
    """By one coefficient, or by one each."""
    each = coefs * len(before) if len(coefs) == 1 else coefs
    for parameter, gradient, coef in zip(parameters, before, each, strict=True):
        ulps = 1000 if gradient.dtype == torch.float64 else 1.5  # in fp64 the norm's own rounding shows
        oracle.assert_scaled(local(parameter.grad), gradient, coef, ulps)


def copies(parameters: list[Parameter]) -> list[Tensor]:
    return [copy.deepcopy(local(parameter.grad)) for parameter in parameters]
