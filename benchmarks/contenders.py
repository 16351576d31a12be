"""Who takes part: torch's foreach path, its loop, torch.compile of it, and fusedclip on each of its engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import utils as torch_clip

from benchmarks.operations import PASSES, Operation

Call = Callable[[Sequence[Parameter], float], Tensor | None]
TORCH_FOREACH = "torch foreach"
OURS = "fusedclip"
# The order in which a device's engine is looked for when one has to stand for fusedclip.
ENGINES = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Contender:
    """A named way of doing the operations; an operation that it has no call for is left out of the table."""

    name: str
    calls: dict[Operation, Call]
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def passes(self, operation: Operation) -> int | None:
        """How often the gradients' bytes are moved; None where that is the implementation's own affair."""
        if self.name == f"{OURS} reference":
            return None
        return PASSES.get(OURS if self.ours else self.name, {}).get(operation)


def gradients_of(parameters: Sequence[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def torch_contender(name: str, foreach: bool) -> Contender:
    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return torch_clip.clip_grad_norm_(parameters, limit, foreach=foreach)

    def value(parameters: Sequence[Parameter], limit: float) -> None:
        torch_clip.clip_grad_value_(parameters, limit, foreach=foreach)

    # torch has no public function for this; these are the two ways that people write.
    def norms(parameters: Sequence[Parameter], limit: float) -> Tensor:
        gradients = gradients_of(parameters)
        if foreach:
            return torch.stack(torch._foreach_norm(gradients))
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])

    def norm(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return torch_clip.get_total_norm(gradients_of(parameters), foreach=foreach)

    return Contender(name, _table(clip, value, norms, norm))


def torch_compiled() -> Contender:
    """torch.compile of torch's own function; compiles for about 30 s on two cores at its first call."""

    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return torch_clip.clip_grad_norm_(parameters, limit, foreach=True)

    compiled = torch.compile(clip)
    return Contender("torch.compile", {Operation.NOT_CLIPPED: compiled, Operation.CLIPPED: compiled})


def fusedclip_contender(engine: str) -> Contender:
    import fusedclip

    def clip(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return fusedclip.clip_grad_norm_(parameters, limit)

    def value(parameters: Sequence[Parameter], limit: float) -> None:
        fusedclip.clip_grad_value_(parameters, limit)

    def norms(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return fusedclip.get_per_tensor_norms(gradients_of(parameters))

    def norm(parameters: Sequence[Parameter], limit: float) -> Tensor:
        return fusedclip.get_total_norm(gradients_of(parameters))

    def context() -> AbstractContextManager[Any]:
        return fusedclip.backends.use(engine)

    return Contender(f"{OURS} {engine}", _table(clip, value, norms, norm), context)


def line_up(device: torch.device, compiled: bool = False) -> list[Contender]:
    """Every contender that can run on this device."""
    contenders = [torch_contender(TORCH_FOREACH, foreach=True), torch_contender("torch loop", foreach=False)]
    if compiled:
        contenders.append(torch_compiled())
    if device.type == "cuda":
        from benchmarks.peers import peers  # it needs this module

        contenders += peers()
    return [*contenders, *map(fusedclip_contender, engines_for(device))]


def engines_for(device: torch.device) -> list[str]:
    """fusedclip's engines for this device, the preferred one first."""
    import fusedclip

    elsewhere = {"cpu": ("cuda", "triton"), "cuda": ("cpu",)}.get(device.type, ())
    available = [engine for engine in fusedclip.backends.available() if engine not in elsewhere]
    return sorted(available, key=ENGINES.index)


def _table(clip: Call, value: Call, norms: Call, norm: Call) -> dict[Operation, Call]:
    return {
        Operation.NOT_CLIPPED: clip,
        Operation.CLIPPED: clip,
        Operation.VALUE: value,
        Operation.PER_TENSOR_NORMS: norms,
        Operation.NORM: norm,
    }
