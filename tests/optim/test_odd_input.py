"""Parameters, gradients, states and checkpoints that are not quite what they seem."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedclip.optim import SGD, AdamW

from ..conftest import Engine, engines


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    p = Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


@engines("cpu", "cuda", "triton", "reference", on="cpu")
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_gradient_that_torch_negates_on_reading(engine: Engine, shape: tuple[int, ...]) -> None:
    """Autograd hands the imaginary part of a conjugate to a single real parameter as a view with a sign to come."""
    moved = []
    for kind in (AdamW, torch.optim.AdamW):
        p = Parameter(torch.full(shape, 2.0))
        torch.complex(torch.ones(shape), p).conj().mul(torch.full(shape, 1 + 2j)).real.sum().backward()  # type: ignore[no-untyped-call]
        assert p.grad is not None
        assert p.grad.is_neg() == (p.numel() == 1)
        kind([p], lr=0.1).step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved)


@engines("cpu", "cuda", "triton", "reference", on="cpu")
def test_a_parameter_that_torch_negates_on_reading(engine: Engine) -> None:
    p = Parameter(torch.tensor([1 + 2j]).conj().imag)
    assert p.is_neg()
    p.grad = torch.ones(1)
    SGD([p], lr=0.5).step()
    assert p.item() == -2.5


@engines("cpu", "cuda", "triton", "reference", on="cpu")
def test_a_state_that_torch_negates_on_reading(engine: Engine) -> None:
    p = Parameter(torch.ones(1))
    optimizer = SGD([p], lr=1.0, momentum=0.5)
    optimizer.state[p]["momentum_buffer"] = torch.tensor([1 + 2j]).conj().imag
    optimizer.state[p]["step"] = torch.tensor(1.0)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == 2.0


class Named(Parameter):
    """A subclass that changes nothing."""


@engines("cpu", "cuda", "triton", "reference", on="cpu")
def test_a_subclass_of_parameter_that_is_its_own_memory(engine: Engine) -> None:
    ours, theirs = [Named(torch.ones(5)), parameter(3)], [Named(torch.ones(5)), parameter(3)]
    for p in (ours[0], theirs[0]):
        p.grad = torch.arange(5.0)
    version = ours[0]._version
    AdamW(ours, max_norm=1e9).step()
    torch.optim.AdamW(theirs).step()
    torch.testing.assert_close(ours, theirs)
    assert ours[0]._version > version


@pytest.mark.parametrize("after", [0, 1])
def test_split_masters_of_a_model_that_became_fp16(after: int) -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = AdamW(model.parameters(), master="split")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(after):
        optimizer.step()
    model.half()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='is fp16; use master="fp32"'):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_a_model_that_became_fp32_has_no_masters(master: Any) -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = AdamW(model.parameters(), master=master)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.raises(KeyError, match="no master of this parameter"):
        optimizer.master_of(model.weight)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_master_that_is_dropped_is_built_anew(kind: Any) -> None:
    """As the documents advise whoever writes to a parameter that has one."""
    p = parameter(4, dtype=torch.bfloat16)
    optimizer = kind([p], lr=1.0, master="fp32")
    optimizer.step()
    p.data.fill_(5.0)
    optimizer.state[p].pop("master")
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 5.0))
    assert torch.equal(optimizer.master_of(p), torch.full((4,), 5.0))


def test_steps_that_old_checkpoints_have_as_numbers() -> None:
    theirs: Any = torch.optim.AdamW([parameter(3)])
    theirs.step()
    saved = theirs.state_dict()
    saved["state"][0]["step"] = 1
    ours, p = AdamW([parameter(3)]), theirs.param_groups[0]["params"][0]
    q = ours.param_groups[0]["params"][0]
    q.data.copy_(p.data)
    ours.load_state_dict(copy.deepcopy(saved))
    theirs.load_state_dict(saved)
    ours.step()
    theirs.step()
    torch.testing.assert_close(q, p)
    assert ours.state[q]["step"] == 2


@engines("cpu", "cuda", "triton", "reference", on="cpu")
def test_a_step_that_is_a_number_is_named(engine: Engine) -> None:
    p = parameter(3)
    optimizer = AdamW([p])
    optimizer.step()
    optimizer.state[p]["step"] = 1
    before = p.detach().clone()
    with pytest.raises(TypeError, match=r'the state "step" of a parameter of shape \(3,\) must be a tensor, got 1'):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("bad", [{"betas": (0.9, 2.0)}, {"lr": math.nan}])
def test_a_failed_load_changes_nothing(bad: dict[str, Any]) -> None:
    p = parameter(3)
    optimizer = AdamW([p])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    saved["param_groups"][0].update(bad)
    saved["state"][0]["exp_avg"].zero_()
    with pytest.raises(ValueError, match="it must be at least 0"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, value in before["state"][0].items():
        assert torch.equal(after["state"][0][name], value)
    optimizer.step()


def test_a_scaler_leaves_nothing_on_an_optimizer_whose_step_raises() -> None:
    """torch takes them off again only if the step returns, and would multiply the next scale by what it finds."""
    good, p = parameter(3), Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 0.0, 0.0]).to_sparse()
    optimizer, scaler = AdamW([good, p]), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    with pytest.raises(TypeError, match="sparse gradient"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("bad", [{"lr": "a"}, {"eps": None}, {"weight_decay": [1]}])
def test_options_that_are_no_numbers(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        AdamW([parameter(3)], **bad)


def test_subnormal_and_huge_gradients_and_steps() -> None:
    """Beside torch, whose fused step keeps to the same order of operations."""
    for scale in (1e-42, 1e-20, 1e18):
        for taken in (0.0, 1e6, 2.0**24):
            ours, theirs = Parameter(torch.ones(50)), Parameter(torch.ones(50))
            optimizers: list[Optimizer] = [AdamW([ours]), torch.optim.AdamW([theirs], fused=True)]
            for p, optimizer in zip((ours, theirs), optimizers, strict=True):
                p.grad = torch.linspace(-1, 1, 50) * scale
                optimizer.step()
                optimizer.state[p]["step"].fill_(taken)
                optimizer.step()
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
            for name in ("exp_avg", "exp_avg_sq"):  # 1e-8 beside them leaves nothing of small ones in the parameters
                moments = [o.state[p][name] for p, o in zip((ours, theirs), optimizers, strict=True)]
                torch.testing.assert_close(*moments, rtol=2e-6, atol=1.5e-45)
            assert optimizers[0].state[ours]["step"] == optimizers[1].state[theirs]["step"]


def tensors(optimizer: Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


def test_states_made_in_inference_mode_go_on() -> None:
    ours, whole = parameter(4), parameter(4)
    optimizers = AdamW([ours], max_norm=0.5), AdamW([whole], max_norm=0.5)
    with torch.inference_mode():
        optimizers[0].step()
    optimizers[1].step()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(ours, whole)
    for a, b in zip(tensors(optimizers[0]), tensors(optimizers[1]), strict=True):
        assert torch.equal(a, b)
