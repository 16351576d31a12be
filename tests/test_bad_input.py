"""Every mistake gets one clear exception, and leaves every gradient as it was."""

import math
import re
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
    with pytest.raises(TypeError, match=r"got dict; this looks like a state_dict\(\), pass model\.parameters\(\)"):
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


def hinted() -> list[Any]:
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    return [
        (torch.nn.Sequential(layer), "got Sequential; pass its .parameters()"),
        ([layer], "parameters[0] is a Linear, not a tensor; pass its .parameters()"),
        (layer.parameters, "got method; call it, and pass what it returns"),
        (layer.state_dict(), "got OrderedDict; this looks like a state_dict(), pass model.parameters()"),
        (dict(layer.named_parameters()), "got dict; pass its .values()"),
        (list(layer.named_parameters()), "[0] is a tuple, not a tensor; pass .parameters(), not .named_parameters()"),
        (optimizer, "got SGD; pass the parameters of its param_groups"),
        (optimizer.param_groups, "parameters[0] is a dict, not a tensor; pass its ['params']"),
        (optimizer.param_groups[0], "got dict; pass its ['params']"),
        (optimizer.state_dict(), "got dict; this looks like a state_dict(), pass model.parameters()"),
        ([layer.parameters()], "parameters[0] is a generator, not a tensor; pass one flat list of tensors"),
        ([(layer.weight, layer.bias)], "parameters[0] is a tuple, not a tensor; pass one flat list of tensors"),
        ([layer.weight, None], "parameters[1] is a NoneType, not a tensor; leave it out"),
        (2.0, "got float; parameters come first"),
        ("", "parameters must be a tensor or an iterable of tensors, got str"),
    ]


@pytest.mark.parametrize("call", clip_functions())
@pytest.mark.parametrize(("bad", "hint"), hinted())
def test_hints(call: Any, bad: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=re.escape(hint)):
        call(bad)


def test_hints_where_gradients_are_wanted() -> None:
    layer = torch.nn.Linear(1, 1)
    for bad, hint in (
        (layer, "got Linear; pass the gradients of its .parameters()"),
        (layer.state_dict(), "got OrderedDict; pass its .values()"),
    ):
        with pytest.raises(TypeError, match=re.escape(hint)):
            fusedclip.get_total_norm(bad)


def test_containers_of_parameters_are_legal() -> None:
    parameter = parameters([torch.ones(4)])[0]
    for some in ({parameter}, {parameter: 0.1}, torch.nn.ParameterList([parameter]), (parameter,), iter([parameter])):
        assert fusedclip.clip_grad_norm_(some, math.inf) == 2  # type: ignore[arg-type]


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
