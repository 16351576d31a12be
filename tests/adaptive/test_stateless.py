"""AGC, block RMS and KL clipping, beside a few lines of plain torch."""

import math

import pytest
import torch
from torch import Tensor, nn

from fusedclip import adaptive

from ..conftest import Engine, copies, parameters

SHAPES = [(9, 5), (4, 3, 3, 3), (6,), (), (1, 7), (0, 3)]


def made(engine: Engine, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[Tensor]]:
    grads = [
        engine.randn(*(shape or (1,)), seed=i, dtype=dtype).reshape(shape) * 10.0 ** (i - 2)
        for i, shape in enumerate(SHAPES)
    ]
    params = parameters(list(grads))
    with torch.no_grad():
        for i, parameter in enumerate(params):
            parameter.copy_(
                engine.randn(max(parameter.numel(), 1), seed=50 + i, dtype=dtype)[: parameter.numel()].view(
                    parameter.shape
                )
            )
        params[0][3] = 0  # a unit that only eps lets move
        grads[0][4] = 0
    return params, copies(grads)


def agc(weight: Tensor, grad: Tensor, factor: float, eps: float, p: float) -> Tensor:
    rows = (-1,) if weight.dim() < 2 else tuple(range(1, weight.dim()))
    if weight.dim() == 0:
        weight, grad = weight.reshape(1), grad.reshape(1)

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.double(), p, rows, keepdim=True)

    limit = norm(weight).clamp(min=eps) * factor
    return torch.where(norm(grad) < limit, 1.0, limit / norm(grad).clamp(min=1e-6)) * grad.double()


@pytest.mark.parametrize("p", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_agc_is_timms(engine: Engine, dtype: torch.dtype, p: float) -> None:
    params, before = made(engine, dtype)
    norm = adaptive.adaptive_clip_grad_(params, 0.05, 1e-2, p, exclude=[params[2]])
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    for i, (parameter, grad) in enumerate(zip(params, before, strict=True)):
        expected = grad.double() if i == 2 else agc(parameter.detach(), grad, 0.05, 1e-2, p).reshape(grad.shape)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=tolerance, atol=1e-30)
    flat = torch.cat([grad.double().flatten() for i, grad in enumerate(before) if i != 2])
    torch.testing.assert_close(norm.double(), torch.linalg.vector_norm(flat, p), rtol=3e-6, atol=0)


def test_agc_excludes_what_an_iterator_gives() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    adaptive.adaptive_clip_grad_(model.parameters(), exclude=model[1].parameters())
    assert model[0].weight.grad.max() < 1
    assert model[1].weight.grad.min() == 1000


def test_agc_of_channels_last_and_of_what_has_no_gradient(engine: Engine) -> None:
    weight = engine.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    parameter, other = nn.Parameter(weight), nn.Parameter(engine.randn(4))
    grad = engine.randn(8, 3, 5, 5, seed=1).to(memory_format=torch.channels_last)
    parameter.grad = grad.clone(memory_format=torch.preserve_format)
    version = parameter.grad._version
    adaptive.adaptive_clip_grad_([parameter, other, parameter])
    torch.testing.assert_close(parameter.grad.double(), agc(weight, grad, 0.01, 1e-3, 2.0), rtol=3e-6, atol=0)
    assert parameter.grad._version > version


def test_the_default_device_does_not_matter_to_block_rms(engine: Engine) -> None:
    (params, _), (same, _) = made(engine), made(engine)
    expected = adaptive.clip_by_block_rms_(params, 0.5)
    with torch.device("meta"):
        assert torch.equal(adaptive.clip_by_block_rms_(same, 0.5), expected)


def test_block_rms_is_optaxs(engine: Engine) -> None:
    params, before = made(engine)
    params.insert(1, nn.Parameter(engine.randn(3)))
    found = adaptive.clip_by_block_rms_(params, 0.5)
    del params[1]
    roots = [
        grad.double().square().mean().sqrt() if grad.numel() else grad.new_zeros((), dtype=torch.float64)
        for grad in before
    ]
    torch.testing.assert_close(
        found.double(), torch.stack([roots[0], torch.zeros_like(roots[0]), *roots[1:]]), rtol=3e-6, atol=0
    )
    for parameter, grad, root in zip(params, before, roots, strict=True):
        assert parameter.grad is not None
        expected = grad.double() / (root / 0.5).clamp(min=1.0)
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize(("lr", "clips"), [(1e-6, False), (10.0, True)])
def test_kl_clip_is_k_facs(lr: float, clips: bool) -> None:
    params = parameters([torch.randn(4, 3), torch.randn(5).to(torch.bfloat16), None])
    steps = [torch.randn(4, 3), torch.randn(5).to(torch.bfloat16), None]
    before = [None if step is None else step.double() for step in steps]
    dot = sum(float((p.grad.double() * s.double()).sum()) for p, s in zip(params, steps, strict=True) if s is not None)
    scale = adaptive.kl_clip_(params, steps, max_kl=1e-3, lr=lr)
    expected = min(1.0, math.sqrt(1e-3 / (lr**2 * abs(dot))))
    assert (expected < 1) == clips
    assert float(scale) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(steps[0].double(), before[0] * expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(steps[1].double(), before[1] * expected, rtol=2**-7, atol=0)


def test_kl_clip_of_nothing_is_one() -> None:
    assert float(adaptive.kl_clip_(parameters([None]), [None], 1e-3, 0.1)) == 1
    assert float(adaptive.kl_clip_(parameters([torch.ones(2)]), [torch.zeros(2)], 1e-3, 0.1)) == 1


def test_kl_clip_of_steps_in_another_dtype_and_of_one_listed_twice() -> None:
    (param,), step = parameters([torch.ones(3)]), torch.full((3,), 10.0, dtype=torch.float64)
    scale = adaptive.kl_clip_([param, param], [step, step], max_kl=1e-3, lr=1.0)
    assert float(scale) == pytest.approx(math.sqrt(1e-3 / 30))
    torch.testing.assert_close(step, torch.full_like(step, 10 * float(scale)))
