"""Under patch_torch() lists with DTensors (FSDP2, tensor parallelism) stay torch's; unpatched, the error says so."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusedclip

from .conftest import parameters


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # type: ignore[no-untyped-call]
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    """As FSDP2 holds them: parameters and gradients are sharded along their first dimension."""
    made = []
    for gradient in (torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0]])):
        shard = [
            DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in (torch.zeros_like(gradient), gradient)
        ]
        made.append(torch.nn.Parameter(shard[0]))
        made[-1].grad = shard[1]
    return made


def gradients_of(params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def elements(params: list[torch.nn.Parameter]) -> list[list[float]]:
    return [g.full_tensor().flatten().tolist() for g in gradients_of(params) if isinstance(g, DTensor)]


def total(norm: Tensor) -> float:
    assert isinstance(norm, DTensor)  # as torch returns it
    return norm.full_tensor().item()


@pytest.mark.parametrize("collect", [list, tuple, iter, lambda params: (p for p in params)])
def test_clip_grad_norm(mesh: DeviceMesh, collect: Callable[[list[Tensor]], list[Tensor]]) -> None:
    params = sharded(mesh)
    with fusedclip.patch_torch():
        assert total(clip_grad_norm_(collect(params), 1.0)) == 5
        assert total(clip_grad_norm_(parameters=collect(params), max_norm=9.0)) == pytest.approx(1)
    assert elements(params) == [pytest.approx([0.6, 0]), pytest.approx([0, 0.8])]


@pytest.mark.parametrize("collect", [list, iter])
def test_siblings(mesh: DeviceMesh, collect: Callable[[list[Tensor]], list[Tensor]]) -> None:
    params = sharded(mesh)
    with fusedclip.patch_torch():
        norm = get_total_norm(collect(gradients_of(params)))
        assert total(norm) == 5
        assert total(get_total_norm(params[0].grad)) == 3
        clip_grads_with_norm_(collect(params), 2.5, norm)
        assert elements(params) == [pytest.approx([1.5, 0]), pytest.approx([0, 2])]
        clip_grad_value_(collect(params), 1.0)
        assert elements(params) == [[1, 0], [0, 1]]
        clip_grads_with_norm_(collect(params), 1.0, torch.tensor(2.0))
    assert elements(params) == [pytest.approx([0.5, 0]), pytest.approx([0, 0.5])]


def test_some_gradients_only(mesh: DeviceMesh) -> None:
    """torch mixes the two nowhere but in clip_grad_value_ without foreach; its errors are the ones to see."""
    params = [*parameters([torch.tensor([5.0, 5.0])]), *sharded(mesh)]
    with fusedclip.patch_torch():
        with pytest.raises(RuntimeError, match=re.escape("mixed torch.Tensor and DTensor")):
            clip_grad_norm_(iter(params), 1.0)
        clip_grad_value_(iter(params), 1.0, foreach=False)
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [1, 1]
    assert elements(params[1:]) == [[1, 0], [0, 1]]


def test_plain_gradients_and_a_limit_or_norm_that_is_a_dtensor(mesh: DeviceMesh) -> None:
    plain, norm = parameters([torch.tensor([3.0, 4.0])]), get_total_norm(gradients_of(sharded(mesh)))
    with fusedclip.patch_torch():
        with pytest.raises(RuntimeError, match=re.escape("mixed torch.Tensor and DTensor")):
            clip_grads_with_norm_(plain, 1.0, norm)
        clip_grad_norm_(plain, norm / 2)
    assert plain[0].grad is not None
    assert plain[0].grad.tolist() == pytest.approx([1.5, 2])
    with pytest.raises(NotImplementedError, match=re.escape("total_norm is a DTensor") + ".*full_tensor"):
        fusedclip.clip_grads_with_norm_(plain, 1.0, norm)
    with pytest.raises(NotImplementedError, match="max_norm is a DTensor"):
        fusedclip.clip_grad_norm_(plain, norm)
    fusedclip.clip_grads_with_norm_(plain, 2.5, norm.full_tensor())  # type: ignore[attr-defined]
    assert plain[0].grad.tolist() == pytest.approx([0.75, 1])


@pytest.mark.parametrize(
    "call",
    [
        lambda params: fusedclip.clip_grad_norm_(params, 1.0),
        lambda params: fusedclip.get_total_norm(params[1].grad),
        lambda params: fusedclip.clip_grads_with_norm_(params, 1.0, 5.0),
        lambda params: fusedclip.clip_grad_value_(params, 1.0),
    ],
)
def test_unpatched_the_error_says_what_works(
    mesh: DeviceMesh, call: Callable[[list[torch.nn.Parameter]], object]
) -> None:
    params = [*parameters([torch.tensor([5.0, 5.0])]), *sharded(mesh)]
    with pytest.raises(NotImplementedError, match=r"is a DTensor.*torch's function.*patch_torch"):
        call(params)
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [5, 5]
    assert elements(params[1:]) == [[3, 0], [0, 4]]
