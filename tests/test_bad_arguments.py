"""Numbers, limits, flags and groups that are none: one short exception names the argument and says the way out."""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedclip
from fusedclip import arguments

from .conftest import parameters

HUGE = 10**5000  # Python refuses to print it


@contextlib.contextmanager
def refused(error: type[Exception], words: str) -> Iterator[None]:
    """These words are said, in a message that one can read, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=re.escape(words)) as caught:
            yield
    assert len(str(caught.value)) <= 250


@pytest.mark.parametrize("max_norm", [-1.0, -1e-9, math.nan, -math.inf, torch.tensor(-1.0), torch.tensor(math.nan)])
def test_bad_max_norm(max_norm: Any) -> None:
    grad = torch.ones(3)
    for call in (
        lambda: fusedclip.clip_grad_norm_(parameters([grad]), max_norm),
        lambda: fusedclip.clip_grads_with_norm_(parameters([grad]), max_norm, 1.0),
        lambda: fusedclip.clip_grad_norm_per_tensor_(parameters([grad]), max_norm),
    ):
        with pytest.raises(ValueError, match=r"max_norm is .*at least 0"):
            call()
    assert (grad == 1).all()


@pytest.mark.parametrize(
    "max_norm", [None, "many", [1.0], torch.ones(2), torch.ones((), dtype=torch.complex64), object()]
)
def test_max_norm_that_is_no_number(max_norm: Any) -> None:
    grad = torch.ones(3)
    with pytest.raises(TypeError, match="max_norm must be a number"):
        fusedclip.clip_grad_norm_(parameters([grad]), max_norm)
    with pytest.raises(TypeError, match="total_norm must be a number"):
        fusedclip.clip_grads_with_norm_(parameters([grad]), 1.0, max_norm)
    assert (grad == 1).all()


@pytest.mark.parametrize("norm_type", [None, "two", [2], object(), 10**400])
def test_norm_type_that_is_no_number(norm_type: Any) -> None:
    grad = torch.ones(3)
    for call in (
        lambda: fusedclip.clip_grad_norm_(parameters([grad]), 0.1, norm_type),
        lambda: fusedclip.get_total_norm([grad], norm_type),
        lambda: fusedclip.get_per_tensor_norms([grad], norm_type),
        lambda: fusedclip.get_grad_stats([grad], norm_type),
        lambda: fusedclip.clip_grad_norm_with_stats_(parameters([grad]), 0.1, norm_type),
        lambda: fusedclip.clip_grad_norm_per_tensor_(parameters([grad]), 0.1, norm_type),
    ):
        with pytest.raises(TypeError, match="norm_type must be a number"):
            call()
    with pytest.raises(ValueError, match="norm_type is NaN"):
        fusedclip.clip_grad_norm_(parameters([grad]), 0.1, math.nan)
    assert (grad == 1).all()


@pytest.mark.parametrize("clip_value", [-1, math.nan])
def test_bad_clip_value(clip_value: float) -> None:
    grad = torch.ones(3)
    with pytest.raises(ValueError, match="clip_value"):
        fusedclip.clip_grad_value_(parameters([grad]), clip_value)
    with pytest.raises(TypeError, match="clip_value must be a number"):
        fusedclip.clip_grad_value_(parameters([grad]), "much")
    assert (grad == 1).all()


def test_negative_total_norm() -> None:
    grad = torch.ones(3)
    with pytest.raises(ValueError, match="total_norm"):
        fusedclip.clip_grads_with_norm_(parameters([grad]), 1.0, -2.0)
    assert (grad == 1).all()


@pytest.mark.parametrize("grad_attr", [None, 3, b"grad"])
def test_grad_attr_that_is_no_name(grad_attr: Any) -> None:
    holders = parameters([torch.ones(2)])
    with pytest.raises(TypeError, match="grad_attr must be the name of an attribute"):
        fusedclip.clip_grad_norm_(holders, 1e-3, grad_attr=grad_attr)
    assert (holders[0].grad == 1).all()


def fake_on_cuda() -> torch.Tensor:
    return FakeTensor(FakeTensorMode(), torch.empty((), device="meta"), torch.device("cuda"))  # type: ignore[no-untyped-call]


def fake() -> torch.Tensor:
    with FakeTensorMode():  # type: ignore[no-untyped-call]
        return torch.ones(())


def unreadable() -> list[Any]:
    """(what can't be read as one number, what the message shows of it)."""
    with warnings.catch_warnings():  # prototypes and betas
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(1)])
        jagged = torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)
        csr = torch.ones(1, 1).to_sparse_csr()
    return [
        (1j, "got 1j (complex)"),
        (np.complex64(1), "got complex64"),
        (np.array(1j), "got ndarray of complex128, shape ()"),
        (np.ones(3), "got ndarray of float64, shape (3,)"),
        (HUGE, "too large for a float, int of 16610 bits"),
        (Fraction(HUGE), "too large for a float, Fraction"),
        (Decimal("sNaN"), "got Decimal"),
        ("x" * 9999, "xxx... (str)"),
        ([1.0] * 9999, "got list of length 9999"),
        (torch.ones((), dtype=torch.complex64), "got Tensor of torch.complex64, shape ()"),
        (torch.ones(2), "got Tensor of torch.float32, shape (2,), on cpu"),
        (torch.ones([1] * 60 + [2]), "shape (1, 1, 1"),
        (torch.ones((), device="meta"), "on meta"),
        (torch.ones(1).to_sparse(), "torch.sparse_coo"),
        (csr, "torch.sparse_csr"),
        (torch.ones(1, 1).to_mkldnn(), "torch._mkldnn"),  # type: ignore[no-untyped-call]
        (nested, "nested"),
        (jagged, "nested"),
        (fake(), "got FakeTensor of torch.float32"),
        (fake_on_cuda(), "on cuda:0"),
    ]


@pytest.mark.parametrize(("bad", "shown"), unreadable(), ids=[shown for _, shown in unreadable()])
def test_numbers_that_cannot_be_read(bad: Any, shown: str) -> None:
    parameter = parameters([torch.ones(3)])[0]
    optimizer = torch.optim.SGD([parameter])
    limit = "must be a number or a dense tensor of one real element, "
    for words, call in (
        (f"max_norm {limit}", lambda: fusedclip.clip_grad_norm_(parameter, bad)),
        (f"max_norm {limit}", lambda: fusedclip.clip_grads_with_norm_(parameter, bad, 1.0)),
        (f"max_norm {limit}", lambda: fusedclip.clip_grad_norm_per_tensor_(parameter, bad)),
        (f"max_norm {limit}", lambda: fusedclip.optim.clip_on_step(optimizer, bad)),
        (f"total_norm {limit}", lambda: fusedclip.clip_grads_with_norm_(parameter, 0.1, bad)),
        (f"clip_value {limit}", lambda: fusedclip.clip_grad_value_(parameter, bad)),
        ("norm_type must be a number such as 2.0 or float('inf'), ", lambda: fusedclip.get_total_norm([], bad)),
        ("norm_type must be a number such as ", lambda: fusedclip.clip_grad_norm_(parameter, 0.1, bad)),
    ):
        with refused(TypeError, words):
            call()
        with refused(TypeError, shown):
            call()
    assert (parameter.grad == 1).all()


@pytest.mark.parametrize(
    "two",
    [
        2,
        "2.0",
        b"2",
        np.float32(2),
        np.float16(2),
        np.int64(2),
        np.array(2.0),
        Fraction(2),
        Decimal(2),
        torch.tensor(2),
    ],
)
def test_numbers_that_can_be_read(two: Any) -> None:
    parameter = parameters([torch.full((4,), 2.0)])[0]
    assert fusedclip.clip_grad_norm_(parameter, two, two) == 4
    torch.testing.assert_close(parameter.grad, torch.ones(4))
    fusedclip.clip_grads_with_norm_(parameter, 1.0, two)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5))
    parameter.grad = torch.full((4,), 9.0)
    fusedclip.clip_grad_value_(parameter, two)
    assert (parameter.grad == 2).all()


def test_true_is_one() -> None:
    parameter = parameters([torch.full((4,), 2.0)])[0]
    fusedclip.clip_grad_norm_(parameter, True)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.5))


def test_numbers_that_require_grad_do_not_warn() -> None:
    parameter, one = parameters([torch.ones(4)])[0], torch.nn.Parameter(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedclip.clip_grad_norm_(parameter, one, one)
        fusedclip.clip_grads_with_norm_(parameter, one, one)
        fusedclip.clip_grad_value_(parameter, one)


def test_swapped_arguments() -> None:
    model = torch.nn.Linear(40, 40)
    optimizer = torch.optim.SGD(model.parameters())
    everything = (list(model.parameters()), model.parameters(), tuple(model.parameters()), model, model.weight)
    for tensors in (*everything, model.state_dict()):
        with refused(TypeError, "the arguments look swapped: the tensors come before max_norm"):
            fusedclip.clip_grad_norm_(1.0, tensors)  # type: ignore[arg-type]
        with refused(TypeError, "the arguments look swapped: the tensors come before norm_type"):
            fusedclip.get_total_norm(2.0, tensors)  # type: ignore[arg-type]
        with refused(TypeError, "the arguments look swapped: the tensors come before clip_value"):
            fusedclip.clip_grad_value_(1.0, tensors)  # type: ignore[arg-type]
    with refused(TypeError, "the arguments look swapped: the optimizer comes before max_norm"):
        fusedclip.optim.clip_on_step(1.0, optimizer)  # type: ignore[arg-type]
    with refused(TypeError, "in this order, got SGD and GradScaler"):
        fusedclip.amp.unscale_and_clip_grad_norm_(optimizer, torch.amp.GradScaler("cpu"), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bad", "error"), [(-1, ValueError), (math.nan, ValueError), ("many", TypeError)])
def test_a_groups_own_limit_is_named(bad: Any, error: type[Exception]) -> None:
    groups = [{"params": parameters([torch.ones(2)])} for _ in range(3)]
    optimizer = torch.optim.SGD([*groups[:2], {**groups[2], "max_norm": bad}], lr=0.1)
    fusedclip.optim.clip_on_step(optimizer, 0.1)
    with refused(error, 'optimizer.param_groups[2]["max_norm"] '):
        optimizer.step()
    for group in groups:
        assert torch.equal(group["params"][0].grad, torch.ones(2))


@pytest.mark.parametrize("defer", ["yes", 1, np.ones(2)])
def test_defer_is_checked_at_registration(defer: Any) -> None:
    optimizer = torch.optim.SGD(parameters([torch.ones(2)]), fused=True)
    with refused(TypeError, "defer must be True, False or None, got "):
        fusedclip.optim.clip_on_step(optimizer, 1.0, defer=defer)
    fusedclip.optim.clip_on_step(optimizer, 1.0).remove()


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (
            "world",
            TypeError,
            "group= must be a torch.distributed.ProcessGroup, a list of them or None, got 'world' (str)",
        ),
        (
            [0, 1],
            TypeError,
            "group= must be a torch.distributed.ProcessGroup, a list of them or None, got list of length 2",
        ),
        (np.ones(2), TypeError, "group= must be a torch.distributed.ProcessGroup, a list of them or None, got ndarray"),
        (-100, ValueError, "group= is a process group that this rank does not belong to"),
    ],
)
def test_group_is_checked_first(group: Any, error: type[Exception], words: str) -> None:
    optimizer = torch.optim.SGD(parameters([torch.ones(2)]))
    scaler = torch.amp.GradScaler("cpu")
    left = iter(parameters([torch.ones(2)]))
    for call in (
        lambda: fusedclip.clip_grad_norm_(left, 1.0, group=group),
        lambda: fusedclip.get_total_norm(left, group=group),
        lambda: fusedclip.optim.clip_on_step(optimizer, 1.0, group=group),
        lambda: fusedclip.amp.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0, group=group),
    ):
        with refused(error, words):
            call()
    assert len(list(left)) == 1


@pytest.mark.parametrize("bad", ["neither", None, HUGE, np.ones(2), "y" * 9999], ids=range(5))
def test_unknown_on_nonfinite(bad: Any) -> None:
    with refused(ValueError, "on_nonfinite must be 'propagate' or 'zero', got "):
        fusedclip.clip_grad_norm_([], 1.0, on_nonfinite=bad)
    with refused(ValueError, "on_nonfinite must be 'propagate' or 'skip', got "):
        fusedclip.optim.clip_on_step(torch.optim.SGD(parameters([torch.ones(2)])), 1.0, on_nonfinite=bad)


def test_what_is_no_leaf() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    computed, set_by_hand, retaining = parameter * 1, parameter * 1, parameter * 1
    set_by_hand.grad = torch.ones(2)
    retaining.retain_grad()
    for legal in (parameter, parameter.detach(), torch.ones(2), retaining, set_by_hand):
        arguments.refuse_non_leaf(legal, "parameters[3]")
    with refused(ValueError, "parameters[3] is not a leaf: it was computed from a parameter (MulBackward0)"):
        arguments.refuse_non_leaf(computed, "parameters[3]")
