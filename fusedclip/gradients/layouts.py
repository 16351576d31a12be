"""One gradient of any layout to the dense real memory behind it, or a reason why it cannot be clipped."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._extension import subnormals_count
from ..dtypes import FLOATING
from ..torch_internals import dispatches

EXACT_TYPES = frozenset({Tensor, torch.nn.Parameter})  # whose memory is what it seems; a subclass may be anything


@dataclass(slots=True)
class Flat:
    """What stands for a gradient in the passes. All tensors but `home` are real and dense."""

    read: Tensor  # its p-norm is the gradient's
    write: Tensor  # scaling or clamping it does that to the gradient
    memory: Hashable | None  # equal for the same stretch of memory; None if it has no elements
    home: Tensor | None = None  # the gradient, where `write` is a copy of it that has to be brought back
    written: Tensor | None = None  # what to bring back: `write` in the gradient's own layout

    def bring_home(self) -> None:
        """After a write."""
        if self.home is not None and self.written is not None:
            store(self.home, self.written)


def store(gradient: Tensor, values: Tensor) -> None:
    """What torch's copy_ does, whatever a subclass has made of that, and to gradients made in inference mode, too."""
    inference = torch.inference_mode(gradient.is_inference() or torch.is_inference_mode_enabled())
    with inference, torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        Tensor.copy_(gradient, values)


def flatten(gradient: Tensor, name: str, p: float | None, *, writable: bool) -> Flat:
    """The memory behind `gradient`, whose p-norm is wanted unless p is None.

    `writable`: refuses elements that share memory, as torch does on writing.
    """
    tensor = _plain(gradient, name)
    if p is None and tensor.is_complex():
        raise TypeError(f"{name} is complex, and complex numbers cannot be clamped")
    if tensor.layout == torch.sparse_coo:
        return _flatten_sparse(gradient, tensor, p)
    if writable and overlaps(tensor):
        raise RuntimeError(
            f"{name}, shape {tuple(tensor.shape)} with strides {tensor.stride()}, is expanded: several of its elements "
            "share memory and cannot be scaled one by one; .clone() it first"
        )
    if is_dense(tensor):
        return _real(tensor, p)
    stand_in = tensor.contiguous()
    flat = _real(stand_in, p)
    flat.memory = (tensor.device, tensor.data_ptr(), tensor.dtype, *_dimensions(tensor))
    flat.home, flat.written = tensor, stand_in
    return flat


def _plain(gradient: Tensor, name: str) -> Tensor:
    """As a torch.Tensor of a layout and dtype that has elements to clip; raises TypeError otherwise."""
    if type(gradient) not in EXACT_TYPES:
        if dispatches(gradient):
            raise TypeError(f"{name} is a {type(gradient).__name__}, a tensor subclass that fusedclip cannot look into")
        gradient = gradient.as_subclass(Tensor)
    gradient = gradient.detach()
    if gradient.device.type == "meta":
        raise TypeError(f"{name} is on the meta device and has no elements to clip")
    if gradient.is_nested:
        raise TypeError(f"{name} is a nested tensor; clip the gradients of its components")
    if gradient.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(f"{name} has layout {gradient.layout}; strided and sparse_coo gradients can be clipped")
    if gradient.dtype not in FLOATING and not gradient.is_complex():
        known = ", ".join(sorted(str(dtype) for dtype in FLOATING))
        raise TypeError(f"{name} has dtype {gradient.dtype}; {known} and complex gradients can be clipped")
    if gradient.layout == torch.strided and not _has_memory(gradient):
        raise TypeError(f"{name} has no memory behind it (a zero tensor, or one inside a torch.func transform)")
    return gradient


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # what wrappers without storage raise
        return False


def _flatten_sparse(gradient: Tensor, tensor: Tensor, p: float | None) -> Flat:
    small = tensor._values().numel() < 32768  # torch's own grain: it uses one thread
    with (
        subnormals_count(tensor.device, threads=int(small)),
        torch.inference_mode(tensor.is_inference() or torch.is_inference_mode_enabled()),
    ):
        coalesced = tensor.coalesce()  # the gradient is the sum of the entries at each index
    values = coalesced._values()
    if values.numel() and not is_dense(values):
        values = values.contiguous()
        coalesced = torch.sparse_coo_tensor(
            coalesced._indices(), values, tensor.shape, is_coalesced=True, check_invariants=False
        )
    flat = _real(values, p)
    entries = tensor._values()
    if values.data_ptr() != entries.data_ptr():
        # Two gradients may share their entries and yet have them at other places.
        indices = (tensor._indices().data_ptr(), tensor._indices().stride())
        flat.memory = (tensor.device, entries.data_ptr(), tensor.dtype, entries.numel(), indices)
        flat.home, flat.written = gradient, coalesced
    return flat


def _real(tensor: Tensor, p: float | None) -> Flat:
    read = write = tensor
    if tensor.is_complex():
        # A lazily conjugated view holds other bits of the same magnitude in the same memory.
        write = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
        # |z|^2 is the sum of both parts' squares; for other norms |z| itself has to be computed.
        if p in (2, None):
            read = write
        else:
            with subnormals_count(tensor.device):
                # The modulus of an inf beside a NaN is inf; here a NaN is one everywhere.
                read = tensor.to(torch.complex128).abs().masked_fill_(tensor.isnan(), math.nan)
    return Flat(read, write, memory_of(write))


def memory_of(tensor: Tensor) -> Hashable | None:
    """Equal for dense tensors in the same stretch of memory; None if there is none, or none that could be found."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return None
    if tensor.numel() == 0 or not _has_memory(tensor):
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.numel())


def parameter_memory(parameter: Tensor) -> Hashable | None:
    """Equal for parameters in the same memory, of any dtype and layout; None if none could be found."""
    if parameter.layout != torch.strided or parameter.is_nested or parameter.numel() == 0 or not _has_memory(parameter):
        return None
    dimensions = () if is_dense(parameter) else tuple(_dimensions(parameter))
    return (parameter.device, parameter.data_ptr(), parameter.element_size(), parameter.numel(), *dimensions)


def is_plain(gradient: Tensor) -> bool:
    """Of an exact type, dense, and of a dtype that engines read: what the sweep takes by itself."""
    exact = type(gradient) in EXACT_TYPES and gradient.layout == torch.strided
    return exact and gradient.dtype in FLOATING and is_dense(gradient) and not gradient.is_neg()


def is_dense(tensor: Tensor) -> bool:
    """The elements fill one stretch of memory, in some order of the dimensions."""
    extent = 1
    for stride, size in _dimensions(tensor):
        if stride != extent:
            return False
        extent *= size
    return True


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    extent = 1
    for stride, size in _dimensions(tensor):
        if stride == 0:
            return True
        if stride < extent:  # dimensions interleave, which may be harmless: look at every element's place
            return len(set(_places(tensor).flatten().tolist())) < tensor.numel()
        extent = stride * (size - 1) + extent
    return False


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that matter, the closest-packed first."""
    if tensor.numel() == 0:
        return []
    return sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


def _places(tensor: Tensor) -> Tensor:
    """Of each element in memory, counted from the first."""
    extent = sum(stride * (size - 1) for stride, size in _dimensions(tensor)) + 1
    return torch.arange(extent, device="cpu").as_strided(tensor.shape, tensor.stride())
