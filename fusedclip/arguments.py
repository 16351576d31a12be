"""What public functions accept, and in which words they refuse.

Every check runs before a gradient is looked at. A message names the argument, shows what was given in a few words and,
where one can guess what was meant, says what to pass instead.
"""

import math
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .torch_internals import dispatches, is_dtensor, user_stacklevel

Tensors = Iterable[Tensor] | Tensor
Limit = SupportsFloat | str | Tensor

_ORDER = "a number such as 2.0 or float('inf')"
_LIMIT = "a number or a dense tensor of one real element"


def check_norm_type(norm_type: SupportsFloat | str) -> float:
    """As a float, "inf" included as in torch. A tensor is read, wherever it is."""
    p = norm_type if type(norm_type) is float else _number(norm_type, "norm_type", _ORDER)
    if p != p:
        raise ValueError("norm_type is NaN; give a number such as 2.0 or float('inf')")
    return p


def check_max_norm(max_norm: Limit, name: str = "max_norm") -> float | Tensor:
    """As a float that is at least 0, or a 0-d tensor on its device, whose value is not looked at."""
    if type(max_norm) is float and max_norm >= 0:  # as nearly always
        return max_norm
    limit = _limit(max_norm, name)
    if isinstance(limit, float) and not limit >= 0:
        raise ValueError(
            f"{name} is {limit}; it must be at least 0 (a negative one would turn gradients around; inf measures)"
        )
    return limit


def check_scope_limits(
    scopes: Mapping[str, Tensors], max_norm: Limit | Mapping[str, Limit | None]
) -> dict[str, float | Tensor]:
    """The limit of each scope by its name; None measures."""
    if not isinstance(scopes, Mapping):
        raise TypeError(f"scopes must map names to parameters, got {shown(scopes)}")
    if not isinstance(max_norm, Mapping):
        limit = check_max_norm(max_norm)
        return dict.fromkeys(scopes, limit)
    for name in scopes.keys() ^ max_norm.keys():
        missing = "max_norm has no entry for" if name in scopes else "max_norm has an entry, and scopes has none, for"
        raise KeyError(f"{missing} {_cut(repr(name))}")
    named = {name: f"max_norm[{_cut(repr(name))}]" for name in scopes}
    limits = {name: math.inf if max_norm[name] is None else max_norm[name] for name in scopes}
    return {name: check_max_norm(limit, named[name]) for name, limit in limits.items()}  # type: ignore[arg-type]


def check_total_norm(total_norm: Limit) -> float | Tensor:
    """As a float, or a 0-d tensor on its device. NaN and inf are answers that a norm may have."""
    at_hand = _norm_at_hand(total_norm)
    limit = _limit(total_norm, "total_norm") if at_hand is None else at_hand
    if type(limit) is float and limit < 0:
        raise ValueError(f"total_norm is {limit}; a norm is at least 0")
    return limit


def _norm_at_hand(total_norm: Limit) -> float | None:
    """Of what `get_total_norm` returned on the CPU: the closer looks take 3 us, a fifth of a small call."""
    if type(total_norm) is not Tensor or not total_norm.is_cpu or total_norm.dim():
        return None
    if total_norm.dtype is not torch.float32 or total_norm.layout is not torch.strided:
        return None
    try:
        return total_norm.item()
    except RuntimeError:  # inside vmap
        return None


def check_clip_value(clip_value: Limit) -> float:
    """As a float that is at least 0. A tensor is read, wherever it is, as in torch."""
    bound = _number(clip_value, "clip_value", _LIMIT)
    if not bound >= 0:
        raise ValueError(f"clip_value is {bound}; it must be at least 0")
    return bound


def on_nonfinite_is(other: str, on_nonfinite: str) -> bool:
    """Whether it is that, and not "propagate", the only thing that it may be beside."""
    if not isinstance(on_nonfinite, str) or on_nonfinite not in ("propagate", other):
        raise ValueError(f"on_nonfinite must be 'propagate' or {other!r}, got {shown(on_nonfinite)}")
    return on_nonfinite == other


def check_defer(defer: bool | None) -> bool | None:
    if defer is not None and not isinstance(defer, bool):
        raise TypeError(f"defer must be True, False or None, got {shown(defer)}")
    return defer


def parameter_list(parameters: Tensors, grad_attr: str) -> list[Tensor]:
    """The parameters that a public function was given, and whether `grad_attr` may name what holds their gradients."""
    if type(parameters) is list and type(grad_attr) is str:  # as nearly always: as_list without the call
        return parameters
    if not isinstance(grad_attr, str):
        raise TypeError(f"grad_attr must be the name of an attribute, got {shown(grad_attr)}")
    return as_list(parameters, "parameters")


def as_list(items: Tensors, noun: str) -> list[Tensor]:
    """What a public function was given, which may be an iterator: once through it. A list is taken as it is; who asks
    its items for gradients copies it before that may run code that changes it. What it holds is not looked at here."""
    if type(items) is list:
        return items
    if isinstance(items, Tensor):
        return [items]
    try:
        iterator = iter(items)
    except TypeError:
        raise _no_tensors(items, noun) from None
    listed = list(iterator)  # outside of the try: what a generator raises is its own affair
    if isinstance(items, types.GeneratorType):
        if not listed and noun == "parameters":
            warnings.warn(  # torch's words
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=user_stacklevel()
            )
    elif isinstance(items, str | bytes):
        raise _no_tensors(items, noun)
    elif isinstance(items, Mapping | torch.nn.Module) and not all(isinstance(item, Tensor) for item in listed):
        raise _no_tensors(items, noun)  # its keys or modules say less than what it is
    return listed


def not_a_tensor(item: object, i: int, noun: str) -> TypeError:
    """The error for an entry of a list of parameters or tensors."""
    way_out = "; leave it out" if item is None else _instead_of(item, noun)
    return TypeError(f"{noun}[{i}] is a {type(item).__name__}, not a tensor{way_out}")


def explain_no_gradients(parameters: list[Any], attribute: str) -> None:
    """No gradient anywhere is legal, unless the caller plainly meant something else."""
    if not parameters:
        return
    if all(_is_no_parameter(p) for p in parameters):
        raise TypeError(
            f"none of the {len(parameters)} entries of parameters is a Parameter, requires grad or has "
            f".{_cut(attribute)}: these look like gradients. Pass the parameters that hold them (get_total_norm takes "
            "gradients)"
        )
    if not any(hasattr(p, attribute) for p in parameters):
        raise AttributeError(f"no parameter has an attribute {_cut(attribute)!r}, which grad_attr names")


def _is_no_parameter(item: Any) -> bool:
    is_known = type(item) is Tensor or (is_dtensor(item) and not isinstance(item, torch.nn.Parameter))
    return is_known and not item.requires_grad


def refuse_repeated(items: list[Tensor], scopes: list[Any], names: list[str]) -> None:
    """Refuse a parameter that is in two scopes, whether it has a gradient or not."""
    seen: dict[int, str] = {}
    for scope, name in zip(scopes, names, strict=True):
        for entry in scope.entries:
            if seen.setdefault(id(items[entry]), name) != name:
                raise ValueError(
                    f"a parameter is in the scopes {seen[id(items[entry])]!r} and {name!r}: entry "
                    f"{entry - scope.entries[0]} of the second; it can be clipped to one limit only"
                )


def refuse_non_leaf(item: Tensor, name: str) -> None:
    """Refuse a tensor whose `.grad` backward() will never fill: one that was computed, say by `p * 1`.

    To be asked before anyone reads `.grad`, at which torch warns for such a tensor. One with a gradient set by hand, or
    that retains its gradient and may have none yet, is legal.
    """
    if item.is_leaf or item.retains_grad:
        return
    with warnings.catch_warnings():  # of what the error says
        warnings.simplefilter("ignore")
        if item.grad is not None:
            return
    raise ValueError(
        f"{name} is not a leaf: it was computed from a parameter ({item.grad_fn and item.grad_fn.name()}), so that "
        "backward() gives it no .grad. Pass the parameter itself, or .retain_grad() it before backward()"
    )


def shown(value: object) -> str:
    """A value in an error's text: a few words whatever it is, and never a tensor's contents, which may be elsewhere."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else f"shape {tuple(value.shape)}"
        layout = "" if value.layout == torch.strided else f", {value.layout}"
        return _cut(f"{kind} of {value.dtype}{layout}, {shape}, on {value.device}")
    if type(value) is int and value.bit_length() > 64:
        return f"int of {value.bit_length()} bits"  # Python refuses to print long ones
    if kind == "ndarray":
        return _cut(f"{kind} of {getattr(value, 'dtype', '?')}, shape {getattr(value, 'shape', '?')}")
    if isinstance(value, list | tuple | dict | set):
        return f"{kind} of length {len(value)}"
    if type(value) in (bool, int, float, complex, str, bytes):
        return f"{_cut(repr(value))} ({kind})"
    return kind


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _limit(limit: Limit, name: str) -> float | Tensor:
    """As a float (any, NaN included), or a 0-d tensor left on its device, which the host would have to wait for."""
    if isinstance(limit, Tensor):
        limit = _gathered(limit)
        if not limit.is_cpu:
            return _scalar(limit, name, _LIMIT)
    return _number(limit, name, _LIMIT)


def _number(value: Limit, name: str, wanted: str) -> float:
    try:
        return float(value if type(value) is int else _real(value, name, wanted))
    except OverflowError:
        raise TypeError(f"{name} must be {wanted}, got one too large for a float, {shown(value)}") from None
    except (TypeError, ValueError):
        raise _no_number(value, name, wanted) from None
    except RuntimeError as error:
        if isinstance(value, Tensor):  # such as a FakeTensor, or one inside vmap
            raise _no_number(value, name, wanted) from error
        raise


def _gathered(value: Tensor) -> Tensor:
    """Of a DTensor what it stands for: of one whose ranks hold parts, after a collective."""
    return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]


def _real(value: Limit, name: str, wanted: str) -> SupportsFloat | str:
    """The same for float(), which would read a tensor with a warning and drop the imaginary part of numpy's numbers."""
    if isinstance(value, Tensor):
        return _scalar(_gathered(value), name, wanted)
    if getattr(getattr(value, "dtype", None), "kind", None) == "c":
        raise _no_number(value, name, wanted)
    return value


def _scalar(tensor: Tensor, name: str, wanted: str) -> Tensor:
    """As a 0-d tensor that doesn't require grad, whose one real element can be read."""
    dense = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_meta
    if not dense or tensor.numel() != 1 or tensor.is_complex() or (not tensor.is_cpu and dispatches(tensor)):
        raise _no_number(tensor, name, wanted)
    tensor = tensor.detach() if tensor.requires_grad else tensor  # float() would warn
    return tensor.reshape(()) if tensor.dim() else tensor


def _no_number(value: object, name: str, wanted: str) -> TypeError:
    swapped = ""
    if name.isidentifier():  # an argument, not an entry of a param group
        if hasattr(value, "param_groups"):
            swapped = f"; the arguments look swapped: the optimizer comes before {name}"
        elif hasattr(value, "clip_") and not isinstance(value, Tensor):  # an adaptive rule
            swapped = f"; call its clip_(parameters), or give it to clip_on_step as {name}"
        elif _holds_tensors(value):
            swapped = f"; the arguments look swapped: the tensors come before {name}"
    return TypeError(f"{name} must be {wanted}, got {shown(value)}{swapped}")


def _holds_tensors(value: object) -> bool:
    if isinstance(value, list | tuple | set | dict):
        return any(isinstance(item, Tensor) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.nn.Module | torch.nn.Parameter | types.GeneratorType)


def _no_tensors(items: object, noun: str) -> TypeError:
    way_out = f"; {noun} come first" if isinstance(items, SupportsFloat) else _instead_of(items, noun)
    given = type(items).__name__
    return TypeError(f"{noun} must be a tensor or an iterable of tensors, got {given}{way_out}")


def _instead_of(given: Any, noun: str) -> str:
    """The way out for what people pass by mistake."""
    of = "the gradients of " if noun == "tensors" else ""
    if hasattr(given, "param_groups"):
        return f"; pass {of}the parameters of its param_groups"
    if isinstance(given, Mapping):
        return _instead_of_mapping(given, noun)
    if hasattr(given, "parameters"):
        return f"; pass {of}its .parameters()"
    if callable(given):
        return "; call it, and pass what it returns"
    if isinstance(given, tuple) and given and isinstance(given[0], str):
        return "; pass .parameters(), not .named_parameters()"
    flat = not isinstance(given, Iterable) or isinstance(given, str | bytes)
    return "" if flat else "; pass one flat list of tensors"


def _instead_of_mapping(given: Mapping[Any, Any], noun: str) -> str:
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if "params" in given:
        return "; pass its ['params']"
    if "param_groups" in given or (tensors and noun == "parameters" and not any(t.requires_grad for t in tensors)):
        return "; this looks like a state_dict(), pass model.parameters()"
    return "; pass its .values()" if tensors else ""
