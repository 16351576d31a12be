"""Who takes part, and the one place to add someone: a function that makes a Contender, and its name in `line_up`."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import utils as torch_clip

import fusedclip
from benchmarks.suites import Operation

Call = Callable[[Sequence[Parameter], float], Tensor | None]
TORCH_FOREACH = "torch foreach"
OURS = "fusedclip"
# apex's and TransformerEngine's compiled modules: they take part where they can be imported.
PEERS = {"apex": "amp_C", "TransformerEngine": "transformer_engine_torch"}
PEERS_CHUNK = 65536  # elements per block, both libraries' default
PEERS_EPS = 1e-6


@dataclass(frozen=True)
class Contender:
    """A named way of doing the operations; an operation that it has no call for is left out of the table.

    `passes`: how often a call moves the gradients' bytes through memory, small reductions left out; an operation is
    missing where that is the implementation's own affair.
    """

    name: str
    calls: Mapping[Operation, Call]
    passes: Mapping[Operation, int] = field(default_factory=dict)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def line_up(device: torch.device, compiled: bool = False) -> list[Contender]:
    """Every contender that can run on this device; of fusedclip's engines the preferred one first."""
    return [
        torch_contender(TORCH_FOREACH, foreach=True),
        torch_contender("torch loop", foreach=False),
        *([torch_compiled()] if compiled else []),
        *(peers() if device.type == "cuda" else []),
        *(fusedclip_contender(engine, forced=number > 0) for number, engine in enumerate(engines_for(device))),
        *([in_two_launches()] if engines_for(device)[0] == "cuda" else []),
    ]


def engines_for(device: torch.device) -> list[str]:
    """fusedclip's engines for this device, the preferred one first."""
    elsewhere = ("cuda", "triton") if device.type == "cpu" else ("cpu",)
    return [engine for engine in fusedclip.backends.available() if engine not in elsewhere]


def torch_contender(name: str, foreach: bool) -> Contender:
    clip = partial(torch_clip.clip_grad_norm_, foreach=foreach)
    value = partial(torch_clip.clip_grad_value_, foreach=foreach)
    norm = of_gradients(partial(torch_clip.get_total_norm, foreach=foreach))

    # torch has no public function for this; these are the two ways that people write.
    def norms(gradients: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(gradients) if foreach else [*map(torch.linalg.vector_norm, gradients)])

    # It reads for the norm, then reads and writes for the multiplication, which it never skips; its foreach clamp is
    # two passes of both, its loop one.
    calls = by_operation(clip, clip, value, of_gradients(norms), norm)
    return Contender(name, calls, by_operation(3, 3, 4 if foreach else 2, 1, 1))


def torch_compiled() -> Contender:
    """torch.compile of torch's own function; compiles for about 30 s on two cores at its first call."""
    clip = torch.compile(partial(torch_clip.clip_grad_norm_, foreach=True))
    return Contender("torch.compile", by_operation(clip, clip), by_operation(3, 3))


def fusedclip_contender(engine: str, forced: bool = True) -> Contender:
    """One of the engines; not `forced` where it is the one that a user gets, who does not pay for being asked."""
    clip, value = fusedclip.clip_grad_norm_, fusedclip.clip_grad_value_
    norms, norm = map(of_gradients, (fusedclip.get_per_tensor_norms, fusedclip.get_total_norm))
    passes = {} if engine == "reference" else by_operation(1, 3, 2, 1, 1)
    calls = by_operation(clip, clip, value, norms, norm)
    context = partial(fusedclip.backends.use, engine) if forced else nullcontext
    return Contender(f"{OURS} {engine}", calls, passes, context)


def in_two_launches() -> Contender:
    """The CUDA engine where it would keep on the chip what fits."""
    clip, form = fusedclip.clip_grad_norm_, partial(mock.patch.object, fusedclip.backends.cuda, "form", "two launches")
    return Contender(f"{OURS} cuda, two launches", by_operation(clip, clip), by_operation(1, 3), form)


def peers() -> Iterator[Contender]:
    """apex's and TransformerEngine's multi-tensor kernels, where they are installed."""
    for name, module in PEERS.items():
        with suppress(ImportError):  # it stays out of the table
            yield multi_tensor(name, importlib.import_module(module))


def multi_tensor(name: str, kernels: Any) -> Contender:
    """Norm and scaling as apex.contrib.clip_grad and Megatron-LM compose them, one launch sequence per dtype."""

    def run(kernel: Any, lists: list[list[Tensor]], *more: Any) -> Any:
        return kernel(PEERS_CHUNK, torch.zeros(1, dtype=torch.int32, device=lists[0][0].device), lists, *more)

    def norm(parameters: Sequence[Parameter], limit: float) -> Tensor:
        norms = [run(kernels.multi_tensor_l2norm, [group], False)[0] for group in by_dtype(gradients_of(parameters))]
        total: Tensor = norms[0][0] if len(norms) == 1 else torch.linalg.vector_norm(torch.cat(norms))
        return total

    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        total = norm(parameters, limit)
        coefficient: Any = (limit / (total + PEERS_EPS)).clamp(max=1.0)
        # The kernel that takes its factor from the device, or the older one, for which the host has to wait.
        scale = getattr(kernels, "multi_tensor_scale_tensor", None)
        for group in by_dtype(gradients_of(parameters)):
            run(scale or kernels.multi_tensor_scale, [group, group], coefficient if scale else float(coefficient))
        return total

    passes = {Operation.NOT_CLIPPED: 3, Operation.CLIPPED: 3, Operation.NORM: 1}
    return Contender(name, {one: norm if one is Operation.NORM else clip for one in passes}, passes)


def by_dtype(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """The peers' kernels take the first tensor's dtype for that of all."""
    dtypes = dict.fromkeys(gradient.dtype for gradient in gradients)
    return [[gradient for gradient in gradients if gradient.dtype == dtype] for dtype in dtypes]


def of_gradients(function: Callable[..., Tensor]) -> Call:
    """A call of a function that takes gradients, and no limit."""
    return lambda parameters, limit: function(gradients_of(parameters))


def gradients_of(parameters: Sequence[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def by_operation(*in_order: Any) -> dict[Operation, Any]:
    """For not clipped, clipped, by value, per-tensor norms, norm, or the first of these."""
    return dict(zip(Operation, in_order, strict=False))
