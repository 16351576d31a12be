"""Unscale and clip in one pass: wrong numbers, and a scaler that afterwards steps where torch's skips, or skips."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler as TorchScaler
from torch.amp.grad_scaler import OptState

from fusedclip import amp, passes
from fusedclip.gradients import gather
from fusedclip.norms import ClipRule

from . import oracle
from .conftest import Engine, copies, engines, parameters
from .device_waits import no_waits
from .host_reads import host_reads
from .ranks import in_one_worker, on_two_ranks

ORDERS = [2.0, 1.0, math.inf, 3.0, 0.5, 0.0, -1.0, -math.inf]


def setup(
    grads: list[Tensor], scale: float = 65536.0, scaler: type[TorchScaler] = amp.GradScaler
) -> tuple[torch.optim.Optimizer, TorchScaler]:
    """An optimizer over parameters with these gradients, and a scaler that has scaled a loss on their device."""
    made = scaler(grads[0].device.type, init_scale=scale)
    made.scale(torch.zeros((), device=grads[0].device))
    optimizer = torch.optim.SGD(parameters(grads), lr=0.1)
    for parameter in held(optimizer):
        nn.init.zeros_(parameter)
    return optimizer, made


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("max_norm", [0.01, 1e9, math.inf])
@pytest.mark.parametrize("scale", [65536.0, 3000.7, 1.0])
def test_agrees_with_torchs_two_calls(engine: Engine, p: float, max_norm: float, scale: float) -> None:
    ours, our_scaler = setup([engine.randn(n, seed=n) * scale for n in (2, 30, 400)], scale)
    theirs, their_scaler = setup([engine.randn(n, seed=n) * scale for n in (2, 30, 400)], scale)
    norm = our_scaler.unscale_and_clip_grad_norm_(ours, max_norm, p)
    their_scaler.unscale_(theirs)
    expected = torch.nn.utils.clip_grad_norm_(held(theirs), max_norm, p)
    torch.testing.assert_close(norm, expected, rtol=3e-6, atol=0)
    for a, b in zip(held(ours), held(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=5e-6, atol=0)
    ours_says, theirs_says = (s._per_optimizer_states[id(o)] for s, o in ((our_scaler, ours), (their_scaler, theirs)))
    assert ours_says == theirs_says
    assert {d: (f.dtype, f.shape) for d, f in ours_says["found_inf_per_device"].items()} == {
        held(ours)[0].device: (torch.float32, torch.Size([]))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [2.0, math.inf, 3.0])
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_one_rounding(engine: Engine, dtype: torch.dtype, p: float, max_norm: float) -> None:
    grads = [engine.randn(n, dtype=dtype, seed=n) * 8 for n in (3, 70001)]
    before = copies(grads)
    optimizer, scaler = setup(grads, 8.0)
    expected = oracle.norm(before, p) / 8
    norm = scaler.unscale_and_clip_grad_norm_(optimizer, max_norm, p, allow_fp16=True)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle.assert_close(norm, expected, 3e-6)
    for after, b in zip(grads, before, strict=True):
        oracle.assert_scaled(after, b, oracle.coefficient(expected, max_norm) / 8, engine.ulps(dtype))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("p", [2.0, 0.0, 3.0, math.inf])
def test_every_engine_knows_the_multiplier(engine: Engine, zero: bool, bad: float, max_norm: float, p: float) -> None:
    """One call of the engine against two passes."""
    count = 70001 if bad == 1.0 else 1001  # where all comes out NaN or 0, more than a tile shows no more
    for multiplier in (torch.tensor(0.125), torch.tensor(1.0, dtype=torch.float64), torch.tensor(3.0)):
        one, two = (gather(parameters([engine.tensor([3.0, bad, -4.0]), engine.randn(count)]), p=p) for _ in range(2))
        rule, multiplier = ClipRule(max_norm, zero), multiplier.to(engine.device)
        got = passes.clip_(one, p, rule, multiplier=multiplier, dtype=torch.float64)
        want = passes.measure(two, p, rule, multiplier=multiplier)
        passes.scale_(two, want.coef, zero=zero)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)
        for a, b in zip(one.reads[0].tensors, two.reads[0].tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_found(engine: Engine, p: float, dtype: torch.dtype, bad: float) -> None:
    grads = [engine.randn(10, dtype=dtype), engine.randn(70001, dtype=dtype)]
    grads[1][500] = bad
    optimizer, scaler = setup(grads)
    scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p)
    before = copies(held(optimizer))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32768
    assert all(torch.equal(a, b) for a, b in zip(held(optimizer), before, strict=True))


@pytest.mark.parametrize(
    ("value", "dtype", "p"),
    [
        (3e38, torch.float32, 2.0),
        (1e38, torch.float32, 9.0),
        (1e300, torch.float64, 2.0),
        (1e308, torch.float64, 1.0),
        (1e-300, torch.float64, -2.0),
    ],
)
def test_finite_gradients_whose_norm_overflows_are_not_an_inf(
    engine: Engine, value: float, dtype: torch.dtype, p: float
) -> None:
    optimizer, scaler = setup([torch.full((100,), value, dtype=dtype, device=engine.device)])
    scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p)
    assert [f.item() for f in scaler._found_inf_per_device(optimizer).values()] == [0.0]


def test_the_same_errors_as_unscale() -> None:
    message = {}
    for name in ("torch", "fusedclip"):
        optimizer, scaler = setup([torch.ones(3)])
        call = scaler.unscale_ if name == "torch" else lambda o, s=scaler: s.unscale_and_clip_grad_norm_(o, 1.0)
        call(optimizer)
        with pytest.raises(RuntimeError) as twice:
            call(optimizer)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError) as stepped:
            call(optimizer)
        scaler.update()
        optimizer.param_groups[0]["params"] = parameters([torch.ones(3, dtype=torch.float16)])
        with pytest.raises(ValueError, match="FP16") as half:
            call(optimizer)
        message[name] = [str(twice.value), str(stepped.value), str(half.value)[:37]]
    assert message["torch"] == message["fusedclip"]
    fresh = amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match="_scale is None"):
        fresh.unscale_and_clip_grad_norm_(optimizer, 1.0)


def test_a_failed_call_changes_neither_gradients_nor_scaler() -> None:
    grads = [torch.ones(3), torch.tensor([1.0, math.inf])]
    optimizer, scaler = setup(grads)
    with pytest.raises(RuntimeError, match=r"non-finite.*parameters\[1\]\.grad"):
        scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, error_if_nonfinite=True)
    assert grads[0].equal(torch.ones(3))
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
    scaler.step(optimizer)  # unscales by itself, finds the inf and skips
    scaler.update()
    assert scaler.get_scale() == 32768
    with pytest.raises(ValueError, match="max_norm"):
        scaler.unscale_and_clip_grad_norm_(optimizer, -1.0)


def test_a_disabled_scaler_clips() -> None:
    optimizer = torch.optim.SGD(parameters([torch.tensor([3.0, 4.0])]), lr=0.1)
    scaler = amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        assert scaler.unscale_and_clip_grad_norm_(optimizer, 1.0) == 5
        torch.testing.assert_close(held(optimizer)[0].grad, torch.tensor([0.6, 0.8]))
        scaler.step(optimizer)
        scaler.update()


def test_no_gradients_is_what_it_is_to_torch() -> None:
    optimizer, scaler = setup([torch.ones(1)])
    held(optimizer)[0].grad = None
    assert scaler.unscale_and_clip_grad_norm_(optimizer, 1.0) == 0
    assert scaler._found_inf_per_device(optimizer) == {}
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


@pytest.mark.parametrize("bad", [0.0, math.inf])
def test_sparse_gradients(bad: float) -> None:
    indices = torch.tensor([[0, 2, 0]])  # 0 twice: the gradient is the sum
    grad = torch.sparse_coo_tensor(indices, torch.tensor([8.0 + bad, 16.0, 16.0]), (4,))
    optimizer, scaler = setup([grad, torch.tensor([32.0])], 8.0)
    norm = scaler.unscale_and_clip_grad_norm_(optimizer, 2.5)
    if bad == 0:
        assert norm == math.sqrt(3**2 + 2**2 + 4**2)
        coef = 2.5 / (norm.item() + 1e-6)
        torch.testing.assert_close(held(optimizer)[0].grad.to_dense(), coef * torch.tensor([3.0, 0.0, 2.0, 0.0]))
    assert scaler._found_inf_per_device(optimizer)[torch.device("cpu")] == (bad != 0)


def test_any_scaler_and_bf16() -> None:
    optimizer, scaler = setup([torch.full((4,), 16.0, dtype=torch.bfloat16)], 8.0, TorchScaler)
    assert amp.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0) == 4.0
    assert held(optimizer)[0].grad.equal(torch.full((4,), 0.5, dtype=torch.bfloat16))
    scaler.step(optimizer)
    scaler.update()
    other, refusing = setup([torch.ones(4, dtype=torch.bfloat16)], 8.0, TorchScaler)
    refusing.process_group = object()
    with pytest.raises(ValueError, match="pass group="):
        amp.unscale_and_clip_grad_norm_(refusing, other, 1.0)


def test_two_optimizers_and_thirty_steps_under_one_scaler() -> None:
    """One optimizer is clipped, the other unscaled by torch or by the step; the scale goes as with torch alone."""

    def run(ours: bool, fused: bool) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        models = [nn.Linear(3, 2), nn.Linear(2, 3)]
        first = torch.optim.AdamW(models[0].parameters(), fused=fused, lr=0.1)
        second = torch.optim.AdamW(models[1].parameters(), fused=fused, lr=0.1)
        scaler = amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        scales = []
        for step in range(30):
            first.zero_grad()
            second.zero_grad()
            scaler.scale(models[1](models[0](torch.randn(5, 3))).square().sum()).backward()
            if step in (0, 7, 8, 20):
                models[step % 2].weight.grad[0, 0] = math.inf
            if ours:
                scaler.unscale_and_clip_grad_norm_(first, 0.1)
            else:
                scaler.unscale_(first)
                nn.utils.clip_grad_norm_(models[0].parameters(), 0.1)
            if step % 3 == 0:
                scaler.unscale_(second)
            scaler.step(first)
            scaler.step(second)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, torch.cat([p.detach().flatten() for m in models for p in m.parameters()])

    for fused in (False, True):
        (scales, values), (expected_scales, expected) = run(True, fused), run(False, fused)
        assert scales == expected_scales
        assert len(set(scales)) > 3
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_one_device_carries_the_flag_of_several() -> None:
    """scaler.step adds the devices' flags up, and torch's kernels skip at exactly 1."""
    devices = [torch.device("cpu"), torch.device("meta")]
    grads = SimpleNamespace(reads=[SimpleNamespace(device=d) for d in devices])
    flags = amp._per_device(torch.tensor(1.0), grads, devices[0], needed=False)
    assert list(flags) == devices
    assert [f.device for f in flags.values()] == devices
    assert flags[devices[0]] == 1
    assert len({id(f) for f in flags.values()}) == 2


def test_the_host_reads_no_tensor() -> None:
    for p in (2.0, 3.0):
        optimizer, scaler = setup([torch.randn(10), torch.randn(70001)])
        with host_reads() as reads:
            scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p)
        assert reads == []
    with host_reads() as reads:
        float(torch.ones(()))
    assert reads  # the counter counts


def test_the_counterpart_of_a_write_is_seen_by_autograd() -> None:
    grads = [torch.randn(10)]
    optimizer, scaler = setup(grads)
    version = grads[0]._version
    scaler.unscale_and_clip_grad_norm_(optimizer, math.inf)
    assert grads[0]._version > version


def ranks_skip_together(rank: int) -> None:
    for p in (2.0, 3.0, 0.0):
        grads = [torch.full((3,), 8.0 * (1 + rank))]
        optimizer, scaler = setup(grads, 8.0)
        norm = scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p, group=dist.group.WORLD)
        oracle.assert_close(norm, oracle.norm([torch.full((3,), 1.0), torch.full((3,), 2.0)], p), 1e-6)
        scaler.update()
        held(optimizer)[0].grad = torch.tensor([1.0, math.inf if rank else 1.0, 2.0])
        scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p, group=dist.group.WORLD)
        assert scaler._found_inf_per_device(optimizer)[torch.device("cpu")] == 1
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0


def a_rank_without_gradients_skips_too(rank: int) -> None:
    optimizer, scaler = setup([torch.tensor([math.inf])])
    if rank == 1:
        held(optimizer)[0].grad = None
    scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, group=dist.group.WORLD)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32768


@in_one_worker
@pytest.mark.parametrize("scenario", [ranks_skip_together, a_rank_without_gradients_skips_too])
def test_group(scenario: object) -> None:
    on_two_ranks(scenario)


@engines("cuda", "triton", on="cuda")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_no_synchronisation_on_a_gpu(engine: Engine, fused: bool, p: float) -> None:
    scaler = amp.GradScaler(engine.device)
    optimizer = torch.optim.AdamW(parameters([engine.randn(n) for n in (10, 70001)]), fused=fused)
    scaler.scale(torch.zeros((), device=engine.device))

    def step() -> None:
        scaler.unscale_and_clip_grad_norm_(optimizer, 1.0, p)
        if fused:  # of the others torch asks whether they may step
            scaler.step(optimizer)
        scaler.update()

    step()  # what is done once may wait
    with no_waits():
        step()


def test_passes_measure_is_clip_without_the_write(engine: Engine) -> None:
    grads = [engine.randn(10), engine.randn(70001)]
    before = copies(grads)
    measured = passes.measure(gather(parameters(grads)), 2.0, ClipRule(1.0), multiplier=torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    clipped = passes.clip_(gather(parameters(grads)), 2.0, ClipRule(1.0), multiplier=torch.tensor(0.5))
    torch.testing.assert_close(measured.norm.float(), clipped.norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(measured.coef, clipped.coef, rtol=1e-6, atol=0)
