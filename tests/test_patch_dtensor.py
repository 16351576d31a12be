"""DTensors through patch_torch(): torch's callers get what torch gave them. One process; tests/distributed has more."""

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
from fusedclip import _extension

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


def test_mixed_with_plain_gradients(mesh: DeviceMesh) -> None:
    """torch raises for such lists."""
    params = [*parameters([torch.tensor([12.0, 0.0])]), *sharded(mesh)]
    with fusedclip.patch_torch():
        assert total(clip_grad_norm_(iter(params), 1.3)) == 13
    assert params[0].grad is not None
    assert params[0].grad.tolist() == pytest.approx([1.2, 0])
    assert elements(params[1:]) == [pytest.approx([0.3, 0]), pytest.approx([0, 0.4])]


def test_limits_and_norms_that_are_dtensors(mesh: DeviceMesh) -> None:
    plain, norm = parameters([torch.tensor([3.0, 4.0])]), get_total_norm(gradients_of(sharded(mesh)))
    assert isinstance(norm, DTensor)
    fusedclip.clip_grads_with_norm_(plain, 2.5, norm)
    assert plain[0].grad is not None
    assert plain[0].grad.tolist() == pytest.approx([1.5, 2])
    assert fusedclip.clip_grad_norm_(plain, norm) == pytest.approx(2.5)
    assert plain[0].grad.tolist() == pytest.approx([1.5, 2])
    fusedclip.clip_grad_value_(plain, norm / 3)
    assert plain[0].grad.tolist() == pytest.approx([1.5, 5 / 3])


def test_unpatched_norms_are_plain(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    norm = fusedclip.clip_grad_norm_(params, 1.0)
    assert type(norm) is Tensor
    assert norm == 5
    assert type(fusedclip.get_total_norm(gradients_of(params))) is Tensor
    assert type(fusedclip.get_per_tensor_norms(gradients_of(params))) is Tensor


def test_gradients_given_as_parameters(mesh: DeviceMesh) -> None:
    with pytest.raises(TypeError, match="these look like gradients"):
        fusedclip.clip_grad_norm_(gradients_of(sharded(mesh)), 1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_computed_tensors_are_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(ValueError, match="is not a leaf"):
        fusedclip.clip_grad_norm_([sharded(mesh)[0] * 1], 1.0)


def test_what_is_inside_is_checked(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    whole = DTensor.from_local(torch.ones(2, dtype=torch.int32), mesh, [Shard(0)], run_check=False)
    for p, value in zip([*params, whole], [params[0].grad, params[1].grad, whole], strict=True):
        p.wrong = value  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"parameters\[2\].wrong has dtype torch.int32"):
        fusedclip.clip_grad_norm_([*params, whole], 1.0, grad_attr="wrong")
    assert elements(params) == [[3, 0], [0, 4]]


def test_gradients_kept_elsewhere(mesh: DeviceMesh) -> None:
    params = sharded(mesh)
    for parameter in params:
        parameter.main_grad, parameter.grad = parameter.grad, None  # type: ignore[attr-defined]
    assert fusedclip.clip_grad_norm_(params, 1.0, grad_attr="main_grad") == 5
    assert params[0].main_grad.full_tensor().tolist() == pytest.approx([0.6, 0])


def test_specs_are_planned_once(mesh: DeviceMesh) -> None:
    from fusedclip.gradients import shards

    params = sharded(mesh)
    fusedclip.clip_grad_norm_(params, 1.0)
    plan = shards._plans[0]
    params[0].grad = None
    fusedclip.clip_grad_norm_(params[1:], 1.0)
    fusedclip.clip_grad_norm_(params[1:], 1.0)
    assert shards._plans[0] is not plan
    assert len(shards._plans) <= 8


def test_without_the_extension(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    params = sharded(mesh)
    none = torch.nn.Parameter(params[0].detach())
    monkeypatch.setattr(_extension, "C", None)
    with fusedclip.backends.use("reference"):
        assert fusedclip.clip_grad_norm_([*params, none], 1.0) == 5
        assert fusedclip.clip_grad_norm_([none], 1.0) == 0
    assert elements(params) == [pytest.approx([0.6, 0]), pytest.approx([0, 0.8])]
