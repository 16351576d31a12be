"""Gradients in one another's memory: what counts once, what is written once, and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fusedclip

from . import oracle
from .conftest import Engine, copies, parameters


def embeddings(engine: Engine) -> list[nn.Parameter]:
    """Two sparse gradients over the same entries, at other indices."""
    wte, wpe = (nn.Embedding(n, 8, sparse=True, device=engine.device) for n in (50, 20))
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0)).to(engine.device)
    places = torch.arange(6, device=engine.device).expand(2, 6)
    ((wte(tokens) + wpe(places)) ** 2).sum().backward()
    assert wte.weight.grad._values().data_ptr() == wpe.weight.grad._values().data_ptr()
    return [wte.weight, wpe.weight]


def summands(engine: Engine) -> list[nn.Parameter]:
    """What autograd makes for a + b: dense gradients of two shapes over one buffer."""
    one, two = nn.Parameter(engine.tensor([[1.0] * 2] * 2)), nn.Parameter(engine.tensor([1.0] * 4))
    ((one.view(4) + two.view(4)) * engine.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert one.grad.data_ptr() == two.grad.data_ptr()
    return [one, two]


def strided(engine: Engine) -> list[nn.Parameter]:
    grad = engine.randn(10)[::2]
    return parameters([grad, grad.view(5)])


def complex_and_real(engine: Engine) -> list[nn.Parameter]:
    grad = torch.complex(engine.randn(5), engine.randn(5, seed=1))
    return parameters([grad, torch.view_as_real(grad)])


def dense(parameter: nn.Parameter) -> torch.Tensor:
    grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    return torch.view_as_real(grad).clone() if grad.is_complex() else grad.clone()


SHARED = [embeddings, summands, strided, complex_and_real]


@pytest.mark.parametrize("make", SHARED)
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 0.0])
def test_gradients_of_different_parameters_count_each_and_are_written_once(
    engine: Engine, make: Callable[[Engine], list[nn.Parameter]], p: float
) -> None:
    holders = make(engine)
    before = [dense(holder) for holder in holders]
    expected = oracle.norm([holder.grad for holder in holders], p)
    oracle.assert_close(fusedclip.clip_grad_norm_(holders, 0.5, p), expected, 3e-6)
    for holder, b in zip(holders, before, strict=True):
        oracle.assert_scaled(dense(holder), b, oracle.coefficient(expected, 0.5), 16.0)  # the norm's own 3e-6


@pytest.mark.parametrize("make", [embeddings, summands, strided])
def test_every_other_way_of_clipping(engine: Engine, make: Callable[[Engine], list[nn.Parameter]]) -> None:
    holders = make(engine)
    before = [dense(holder) for holder in holders]
    grads = [holder.grad for holder in holders]
    oracle.assert_close(fusedclip.get_total_norm(grads), oracle.norm(grads), 3e-6)
    fusedclip.clip_grads_with_norm_(holders, 1.0, 2.0 - 1e-6)
    for holder, b in zip(holders, before, strict=True):
        torch.testing.assert_close(dense(holder), b / 2)
    fusedclip.clip_grad_norm_per_tensor_(holders, 0.01)
    for holder in holders:
        oracle.assert_close(oracle.norm([holder.grad]), 0.01, 1e-3)
    fusedclip.clip_grad_value_(holders, 1e-4)
    assert all(dense(holder).abs().max() <= 1.1e-4 for holder in holders)


@pytest.mark.parametrize("make", SHARED)
def test_unscaled_once(engine: Engine, make: Callable[[Engine], list[nn.Parameter]]) -> None:
    holders = make(engine)
    before = [dense(holder) for holder in holders]
    scaler = torch.amp.GradScaler(engine.device, init_scale=4.0)
    scaler.scale(torch.zeros((), device=engine.device))
    optimizer = torch.optim.SGD(holders, lr=0.1)
    expected = oracle.norm([holder.grad for holder in holders]) / 4
    norm = fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf)
    oracle.assert_close(norm, expected, 3e-6)
    for holder, b in zip(holders, before, strict=True):
        torch.testing.assert_close(dense(holder), b / 4)


def test_one_object_counts_once(engine: Engine) -> None:
    grad = engine.tensor([3.0, 4.0])
    one, two = parameters([grad, grad])
    assert one.grad is two.grad
    assert fusedclip.clip_grad_norm_([one, two, one], 1.0) == 5
    torch.testing.assert_close(grad, engine.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert fusedclip.get_total_norm([grad, grad]) == fusedclip.get_total_norm([grad])


@pytest.mark.parametrize("make", [lambda buffer: buffer[:4].view(2, 2), lambda buffer: buffer[::2].view(2, 2)])
def test_tied_weights_count_once(engine: Engine, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Two parameters with views of one main_grad and of one weight."""
    weight, buffer = engine.randn(4).view(2, 2), engine.randn(8, seed=1)
    tied = [nn.Parameter(weight.view(2, 2), requires_grad=False) for _ in range(2)]
    for one in tied:
        one.main_grad = make(buffer)
    assert tied[0].main_grad is not tied[1].main_grad
    other = nn.Parameter(torch.zeros(2, 2, device=engine.device))
    other.main_grad = make(buffer)
    single = oracle.norm([make(buffer)])
    oracle.assert_close(fusedclip.clip_grad_norm_(tied, math.inf, grad_attr="main_grad"), single, 3e-6)
    both = fusedclip.clip_grad_norm_([*tied, other, tied[0]], math.inf, grad_attr="main_grad")
    oracle.assert_close(both, single * math.sqrt(2), 3e-6)


class Subclass(nn.Parameter):
    pass


@pytest.mark.parametrize("weight", [torch.zeros(4).to(torch.float8_e4m3fn), torch.zeros(4, dtype=torch.uint8)])
@pytest.mark.parametrize("kind", [nn.Parameter, Subclass])
def test_tied_weights_of_any_kind_count_once(engine: Engine, weight: torch.Tensor, kind: type[nn.Parameter]) -> None:
    weight, buffer = weight.to(engine.device), engine.tensor([1.0] * 4)
    tied = [kind(weight, requires_grad=False) for _ in range(2)]
    for one in tied:
        one.main_grad = buffer.view(4)
    assert fusedclip.clip_grad_norm_(tied, 9.0, grad_attr="main_grad") == 2


def test_weights_of_one_address_and_size_are_not_tied_for_that(engine: Engine) -> None:
    weight, grad = engine.randn(8), engine.tensor([1.0, 0.0] * 4)
    holders = [nn.Parameter(weight[::2], requires_grad=False), nn.Parameter(weight[:4], requires_grad=False)]
    for one in holders:
        one.main_grad = grad[::2].view(4)
    oracle.assert_close(fusedclip.clip_grad_norm_(holders, 9.0, grad_attr="main_grad"), math.sqrt(8), 1e-6)


def test_one_object_held_by_a_leaf_and_by_what_was_computed_counts_once(engine: Engine) -> None:
    leaf = engine.tensor([0.0] * 4).requires_grad_()
    computed = leaf * 1
    computed.retain_grad()
    leaf.grad = computed.grad = engine.tensor([1.0] * 4)
    for holders in ([leaf, computed], [computed, leaf]):
        assert fusedclip.clip_grad_norm_(holders, 9.0) == 2


def test_an_attribute_that_makes_a_view_each_time(engine: Engine) -> None:
    """A view that is dropped, as a tied one is, may leave its address to the next."""

    class Viewing(nn.Parameter):
        @property
        def fresh(self) -> torch.Tensor:
            return buffer.view(4)

    weight, buffer = engine.tensor([0.0] * 4), engine.tensor([1.0] * 4)
    holders = [Viewing(weight), Viewing(weight), Viewing(engine.tensor([0.0] * 4))]
    oracle.assert_close(fusedclip.clip_grad_norm_(holders, 9.0, grad_attr="fresh"), math.sqrt(8), 1e-6)


def test_autograd_is_told_of_the_memory_that_was_written_alone(engine: Engine) -> None:
    if not engine.host_knows:
        pytest.skip("the host does not know what was written")
    large, small = engine.tensor([3.0, 4.0]), engine.tensor([0.1, 0.1])
    holders = parameters([large, small, torch.empty(0).to(large).set_(small), torch.empty(0).to(large).set_(large)])
    versions = [holder.grad._version for holder in holders]
    fusedclip.clip_grad_value_(holders, 1.0)
    assert [h.grad._version > v for h, v in zip(holders, versions, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize("order", [1, -1])
def test_partial_overlap_is_written_in_one_order(engine: Engine, order: int) -> None:
    count = 3_000_000 if engine.name == "cpu" else 3000  # enough for several threads
    buffer = engine.randn(count)
    pieces = [buffer[: count // 2], buffer[count // 4 :]][::order]
    before, expected = buffer.clone(), oracle.norm(pieces)
    oracle.assert_close(fusedclip.clip_grad_norm_(parameters(pieces), expected / 2), expected, 3e-6)
    coef = torch.tensor(oracle.coefficient(expected, expected / 2), dtype=torch.float64)
    twice = torch.zeros(count, dtype=torch.bool)
    twice[count // 4 : count // 2] = True
    scaled = (before.cpu().double() * coef).float()
    scaled[twice] = (scaled[twice].double() * coef).float()
    torch.testing.assert_close(buffer.cpu(), scaled, rtol=1e-5, atol=0)


def overlapping(engine: Engine) -> list[torch.Tensor]:
    buffer = engine.randn(30)
    return [buffer[:20], buffer[10:]]


def strided_over_dense(engine: Engine) -> list[torch.Tensor]:
    buffer = engine.randn(30)
    return [buffer[::2], buffer[10:]]


@pytest.mark.parametrize("make", [overlapping, strided_over_dense])
def test_different_coefficients_for_shared_memory_are_refused(
    engine: Engine, make: Callable[[Engine], list[torch.Tensor]]
) -> None:
    grads = [engine.randn(3), *make(engine)]
    before = copies(grads)
    with pytest.raises(ValueError, match=r"parameters\[1\]\.grad and parameters\[2\]\.grad share memory.*clone"):
        fusedclip.clip_grad_norm_per_tensor_(parameters(grads), 0.1)
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


def test_strided_gradients_that_pass_between_each_other_share_nothing(engine: Engine) -> None:
    buffer = engine.randn(10, 6)
    pieces = [buffer[:, :3], buffer[:, 3:], buffer[:0]]
    norms = fusedclip.clip_grad_norm_per_tensor_(parameters(pieces), 0.1)
    assert norms.shape == (3,)
    for piece in pieces[:2]:
        oracle.assert_close(oracle.norm([piece]), 0.1, 1e-4)


def test_many_duplicates_take_no_longer_than_many_gradients() -> None:
    """Counted in steps rather than seconds: each entry's gradient is asked for once."""
    asked = 0

    class Counting(nn.Parameter):
        @property
        def grad(self) -> torch.Tensor:
            nonlocal asked
            asked += 1
            return shared

    shared = torch.ones(2)
    holders = [Counting(torch.zeros(2)) for _ in range(3000)]
    assert fusedclip.get_total_norm([shared] * 3000) == fusedclip.clip_grad_norm_(holders, math.inf)
    assert asked == 3000
