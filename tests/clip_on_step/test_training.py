"""200 steps of a small GPT with every optimizer of torch, with a loss scaler that skips some."""

import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusedclip import amp
from fusedclip.optim import clip_on_step

from .. import tiny_gpt

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 1e-2},
    "Adagrad": {"lr": 0.05},
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3},
    "Adamax": {"lr": 3e-3},
    "Muon": {"lr": 1e-2},
    "NAdam": {"lr": 3e-3},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
MAX_NORM = 2.2  # for the tiny GPT: clips some steps, not all
# How far parameters may be apart after 200 steps, relative to the largest: 1e-7 for most; SGD with momentum is the most
# chaotic with 3e-5 in fp32 and 5e-14 in fp64.
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-11}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Nothing here is worth a second one, which on a busy machine makes a test twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_has_every_optimizer_of_torch() -> None:
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    assert classes - {"Optimizer", "SparseAdam", "LBFGS"} == set(OPTIMIZERS)  # those two have tests of their own


def train(name: str, way: str, dtype: torch.dtype, fused: bool | None) -> tuple[list[float], Tensor, list[float]]:
    """Scales, final parameters and norms. `way`: torch, amp, or when the scaler unscales and `defer`."""
    gpt = tiny_gpt.model(dtype)
    trained = [p for p in gpt.parameters() if name != "Muon" or p.ndim == 2]
    extra = {} if fused is None else {"fused": fused}
    optimizer = getattr(torch.optim, name)(trained, **OPTIMIZERS[name], **extra)
    scaler = amp.GradScaler("cpu", init_scale=1024.0, growth_interval=17)
    norms: list[float] = []
    when, _, defer = way.partition(" ")
    if defer:
        handle = clip_on_step(optimizer, MAX_NORM, defer={"None": None, "False": False, "True": True}[defer])

    def clip() -> None:
        if when in ("torch", "before"):
            scaler.unscale_(optimizer)
        if when == "torch":
            norms.append(nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        elif when == "amp":
            norms.append(scaler.unscale_and_clip_grad_norm_(optimizer, MAX_NORM).item())

    scales = tiny_gpt.train(gpt, optimizer, scaler, clip, 200, planted=frozenset({2, 40, 41, 120}))
    assert not defer or handle.total_norm is not None
    return scales, torch.cat([p.detach().flatten() for p in trained]), norms


@functools.cache
def torchs(name: str, dtype: torch.dtype) -> tuple[list[float], Tensor, list[float]]:
    return train(name, "torch", dtype, None)


def in_one_worker(names: Iterable[str]) -> list[object]:
    """What is compared with the same training of torch's."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in sorted(names)]


def assert_trains_alike(name: str, way: str, dtype: torch.dtype, fused: bool | None, bound: float) -> None:
    scales, values, _ = train(name, way, dtype, fused)
    expected_scales, expected, norms = torchs(name, dtype)
    assert scales == expected_scales
    assert len(set(scales)) > 5
    assert 10 < sum(norm > MAX_NORM for norm in norms if math.isfinite(norm)) < 199
    error = (values - expected).abs().max() / expected.abs().max()
    assert error <= bound, error


@pytest.mark.parametrize("way", ["amp", "around False", "before None"])
@pytest.mark.parametrize("name", in_one_worker(OPTIMIZERS))
def test_200_steps(name: str, way: str) -> None:
    """In fp64, whose bound is the tighter one by far."""
    assert_trains_alike(name, way, torch.float64, None, DTYPES[torch.float64])


# Muon orthogonalises in bf16, which makes a rounding difference in fp32 a visible one.
@pytest.mark.parametrize("name", in_one_worker({*OPTIMIZERS} - {"Muon"}))
def test_200_steps_in_fp32(name: str) -> None:
    assert_trains_alike(name, "amp", torch.float32, None, DTYPES[torch.float32])


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("amp", torch.float64),
        *((f"{when} {defer}", torch.float64) for when in ("around", "before") for defer in ("None", "False", "True")),
        *((f"{when} {defer}", torch.float32) for when in ("around", "before") for defer in ("None", "True")),
    ],
)
@pytest.mark.parametrize("name", in_one_worker(FUSED))
def test_200_steps_fused(name: str, way: str, dtype: torch.dtype) -> None:
    """In fp64, and in fp32 where it is the step that multiplies."""
    # A deferred coefficient is rounded to fp32, in which torch's kernels take it.
    bound = 1e-4 if way.endswith("True") else DTYPES[dtype]
    assert_trains_alike(name, way, dtype, True, bound)
