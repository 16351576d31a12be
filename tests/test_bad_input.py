"""Every mistake gets one clear exception, and leaves every gradient as it was."""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedclip

from .conftest import Engine, copies, parameters


def sparse_csr() -> torch.Tensor:
    with warnings.catch_warnings():  # torch says that the layout is in beta
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


def clip_functions() -> list[Any]:
    return [
        lambda ps: fusedclip.clip_grad_norm_(ps, 1e-3),
        lambda ps: fusedclip.clip_grad_norm_(ps, 1e-3, 1.0, True),
        lambda ps: fusedclip.clip_grads_with_norm_(ps, 1e-3, 1.0),
        lambda ps: fusedclip.clip_grad_value_(ps, 1e-3),
        lambda ps: fusedclip.clip_grad_norm_per_tensor_(ps, 1e-3),
    ]


@pytest.mark.parametrize("call", clip_functions())
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError, r"parameters\[1\]\.grad has dtype torch\.int64"),
        (torch.ones(3, dtype=torch.bool), TypeError, r"torch\.bool"),
        (torch.ones(3).to(torch.float8_e4m3fn), TypeError, r"float8_e4m3fn"),
        (torch.ones(3, device="meta"), TypeError, r"parameters\[1\]\.grad is on the meta device"),
        (torch.ones(1).expand(3), RuntimeError, r"parameters\[1\]\.grad.*is expanded.*clone"),
        (torch.as_strided(torch.ones(9), (3, 3), (2, 1)), RuntimeError, r"share memory"),
        (torch._efficientzerotensor(3), TypeError, r"no memory behind it"),
        (sparse_csr(), TypeError, r"layout torch\.sparse_csr"),
        ("a string", TypeError, r"parameters\[1\]\.grad is a str, not a tensor"),
    ],
)
def test_bad_gradient(engine: Engine, call: Any, bad: Any, error: type[Exception], message: str) -> None:
    good = engine.randn(5)
    before = good.clone()
    with pytest.raises(error, match=message):
        call([*parameters([good]), HasGrad(bad)])
    assert torch.equal(good, before)


class HasGrad(torch.Tensor):
    """A tensor with a .grad that torch itself would not have let in."""

    grad: Any = None

    def __new__(cls, grad: Any) -> "HasGrad":
        self = torch.zeros(3).as_subclass(cls)
        self.__dict__["bad"] = grad
        return self

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("__dict__")["bad"] if name == "grad" else super().__getattribute__(name)


def test_complex_gradients_cannot_be_clamped(engine: Engine) -> None:
    good = engine.randn(5)
    grads = [good, torch.ones(3, dtype=torch.complex64, device=engine.device)]
    before = copies(grads)
    with pytest.raises(TypeError, match=r"parameters\[1\]\.grad is complex"):
        fusedclip.clip_grad_value_(parameters(grads), 0.01)
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


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


def test_unknown_on_nonfinite() -> None:
    with pytest.raises(ValueError, match="on_nonfinite must be"):
        fusedclip.clip_grad_norm_([], 1.0, on_nonfinite="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize("call", clip_functions())
def test_parameters_that_are_none(call: Any) -> None:
    for bad, hint in (
        (3.0, "float"),
        (None, "NoneType"),
        (torch.nn.Linear(1, 1), r"Linear; pass its \.parameters\(\)"),
    ):
        with pytest.raises(TypeError, match=f"parameters must be a tensor or an iterable of tensors, got {hint}"):
            call(bad)
    with pytest.raises(TypeError, match=r"parameters\[0\] is a tuple, not a tensor; pass \.parameters\(\)"):
        call(torch.nn.Linear(1, 1).named_parameters())
    with pytest.raises(TypeError, match=r"parameters\[0\] is a str"):
        call({"weight": torch.ones(1)})
    with pytest.raises(TypeError, match=r"parameters\[1\] is a NoneType"):
        call([torch.nn.Parameter(torch.ones(1)), None])


def test_tensors_that_are_none() -> None:
    for call in (fusedclip.get_total_norm, fusedclip.get_per_tensor_norms):
        with pytest.raises(TypeError, match=r"tensors\[1\] is a NoneType, not a tensor"):
            call([torch.ones(1), None])
        with pytest.raises(TypeError, match=r"tensors\[0\] has dtype torch\.int32"):
            call([torch.ones(1, dtype=torch.int32)])
        with pytest.raises(TypeError, match="meta"):
            call([torch.ones(1, device="meta")])


@pytest.mark.parametrize("call", clip_functions())
def test_gradients_given_as_parameters(call: Any) -> None:
    grads = [torch.ones(2), torch.ones(3)]
    with pytest.raises(TypeError, match="look like gradients"):
        call(grads)
    with pytest.raises(TypeError, match="look like gradients"):
        call(grads[0])
    assert all((g == 1).all() for g in grads)


@pytest.mark.parametrize("call", clip_functions())
def test_frozen_models_are_legal(call: Any) -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(frozen.parameters())
        call([torch.ones(2, requires_grad=True)])
        call([])


@pytest.mark.parametrize("grad_attr", [None, 3, b"grad"])
def test_grad_attr_that_is_no_name(grad_attr: Any) -> None:
    holders = parameters([torch.ones(2)])
    with pytest.raises(TypeError, match="grad_attr must be the name of an attribute"):
        fusedclip.clip_grad_norm_(holders, 1e-3, grad_attr=grad_attr)
    assert (holders[0].grad == 1).all()


def test_what_a_generator_raises_comes_through() -> None:
    def broken() -> Any:
        yield torch.nn.Parameter(torch.ones(1))
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        fusedclip.clip_grad_norm_(broken(), 1.0)


def test_only_tensors_have_gradients() -> None:
    for gradient in (torch.ones(2), torch.ones(2).to_sparse()):
        with pytest.raises(TypeError, match=r"parameters\[0\] is a SimpleNamespace, not a tensor"):
            fusedclip.clip_grad_norm_([SimpleNamespace(grad=gradient)], 1.0)  # type: ignore[list-item]


def test_hints() -> None:
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    for bad, hint in (
        (torch.nn.Sequential(layer), r"parameters\[0\] is a Linear, not a tensor; pass its \.parameters\(\)"),
        (optimizer, "got SGD; pass the parameters of its param_groups"),
        (optimizer.param_groups, r"parameters\[0\] is a dict, not a tensor; pass its \['params'\]"),
    ):
        with pytest.raises(TypeError, match=hint):
            fusedclip.clip_grad_norm_(bad, 1.0)  # type: ignore[arg-type]


def test_interrupts_come_through() -> None:
    class Interrupted(torch.Tensor):
        @property
        def grad(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedclip.clip_grad_norm_([torch.ones(1).as_subclass(Interrupted)], 1.0)


def test_nested_tensors_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match="is a nested tensor"):
        fusedclip.get_total_norm([nested])


def test_unknown_grad_attr() -> None:
    with pytest.raises(AttributeError, match="main_gard"):
        fusedclip.clip_grad_norm_([torch.nn.Parameter(torch.ones(1))], 1.0, grad_attr="main_gard")


def test_no_gradients_is_zero_on_the_cpu() -> None:
    for norm in (
        fusedclip.clip_grad_norm_([], 1.0),
        fusedclip.get_total_norm([]),
        fusedclip.get_total_norm([], -math.inf),
    ):
        assert torch.equal(norm, torch.tensor(0.0))
    assert torch.equal(
        fusedclip.clip_grad_norm_([torch.nn.Parameter(torch.ones(1))], 1.0, -math.inf), torch.tensor(0.0)
    )


def test_empty_generator_warns_in_torchs_words() -> None:
    used = torch.nn.Linear(1, 1).parameters()
    list(used)
    with pytest.warns(
        UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur"
    ) as caught:
        fusedclip.clip_grad_norm_(used, 1.0)
    assert caught[0].filename == __file__


def test_wrapper_subclasses_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    holder = HasGrad(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(TypeError, match="TwoTensor, a tensor subclass that fusedclip cannot look into"):
        fusedclip.clip_grad_norm_([holder], 1.0)
