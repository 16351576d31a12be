"""`patch_torch()`: everything that calls torch.nn.utils.clip_grad_norm_ and its siblings uses fusedclip from here on.

torch wraps each of these functions in a small closure that turns autograd off and calls the function itself. We
exchange what the closure calls, so that code which imported a function by name long ago is served as well.
"""

import threading
from collections.abc import Callable
from types import CellType, TracebackType
from typing import Any

import torch
import torch.nn.utils.clip_grad as torch_clip

from . import clip, compile
from .torch_internals import TorchOnly, as_torch

_OURS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": clip.clip_grad_norm_,
    "clip_grad_value_": clip.clip_grad_value_,
    "_get_total_norm": clip.get_total_norm,
    "_clip_grads_with_norm_": clip.clip_grads_with_norm_,
}
_lock = threading.Lock()  # of what follows, and of torch's cells
_active: list["Patch"] = []
_originals: dict[str, Callable[..., Any]] = {}


class Patch:
    """What `patch_torch` returns: torch stays patched until `.remove()`, or the end of the `with` block."""

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Give torch its own functions back, unless another patch is still active. Calling it again does nothing."""
        with _lock:
            if self not in _active:
                return
            _active.remove(self)
            if not _active:
                for name, original in _originals.items():
                    _cell(name).cell_contents = original
                _originals.clear()


def patch_torch() -> Patch:
    """Make the four functions of torch.nn.utils (`clip_grad_norm_`, `clip_grad_value_`, `get_total_norm` and
    `clip_grads_with_norm_`) call fusedclip.

    Holders of the functions, by whatever name and from whenever, are included: the function objects stay the same.
    Calls that are being traced (torch.jit.trace, make_fx, FakeTensorMode) are still torch's, and so are compiled ones
    (torch.compile, fullgraph too) with gradients that no operator of ours takes: other than plain and dense ones.
    For lists with DTensors the norm is one, too, as torch's would be: replicated, on a mesh of one dimension, and made
    by a functional collective.

    Returns:
        A handle with `.remove()`, which is a context manager too. Patches nest, in several threads too; torch is
        patched for all threads while any patch is active.

    Raises:
        RuntimeError: if this version of torch builds the functions in another way; torch is then as it was.
    """
    patch = Patch()
    with _lock:
        if not _active:
            cells = {name: _cell(name) for name in _OURS}
            _originals.update({name: cell.cell_contents for name, cell in cells.items()})
            for name, cell in cells.items():
                cell.cell_contents = _replacement(_OURS[name], _originals[name])
        _active.append(patch)
    return patch


def _replacement(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ours, and torch's for what only torch can do."""
    noun = "tensors" if ours is clip.get_total_norm else "parameters"
    traced = compile.TRACED[ours]

    def ours_or_original(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_kept(args[0]), *args[1:])
        elif noun in kwargs:
            kwargs[noun] = _kept(kwargs[noun])
        if torch.compiler.is_compiling():  # a constant for dynamo
            result = traced(*args, **kwargs)
            return original(*args, **kwargs) if result is NotImplemented else result
        token = as_torch.set(True)
        try:
            return ours(*args, **kwargs)
        except TorchOnly:  # raised before anything is written
            return original(*args, **kwargs)
        finally:
            as_torch.reset(token)

    return ours_or_original


def _kept(items: Any) -> Any:
    """An iterator as a list, so that the second function to be asked finds what the first one read."""
    # An empty generator stays what it is: our function warns of it.
    return (list(items) or items) if hasattr(items, "__next__") else items


def _cell(name: str) -> CellType:
    """The cell of torch's wrapper that holds the function it calls."""
    wrapper = getattr(torch_clip, name, None)
    for cell in getattr(wrapper, "__closure__", None) or ():
        if callable(cell.cell_contents):
            return cell  # type: ignore[no-any-return]
    raise RuntimeError(
        f"torch {torch.__version__} builds torch.nn.utils.clip_grad.{name} in a way that patch_torch() does not know; "
        "call fusedclip's functions by name"
    )
