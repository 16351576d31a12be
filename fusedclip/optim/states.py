"""What an optimizer of our own keeps beside each parameter, and how checkpoints of torch's optimizers become that.

    step, and what the rule's `states` are called     as in torch's state; moments in the dtype that was asked for
    master                                            fp32: the parameter before it was rounded
    remainder                                         of a split master the 16 bits that the parameter has not, as fp16

torch's `load_state_dict` casts all of it to the parameter's dtype. So states go through it as something that it does
not know, and are brought into their own dtypes afterwards.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import shown
from ..torch_internals import is_dtensor, user_stacklevel
from ..updates import join, split

KEYS = {"fp32": "master", "split": "remainder"}
_DTYPES = {"master": torch.float32, "remainder": torch.float16}
_HALVES = (torch.bfloat16, torch.float16)
State = dict[str, Any]


@dataclass(frozen=True)
class Keeping:
    """What the constructor was told of how states are kept."""

    moments: torch.dtype | None
    master: Literal["fp32", "split"] | None

    def key_for(self, parameter: Tensor) -> str | None:
        """The name of its master, or what else makes one; None where it has none. Raises ValueError if it cannot have
        this one, which it may lose by model.half(), too."""
        if self.master is None or parameter.dtype not in _HALVES:
            return None
        if self.master == "split" and parameter.dtype == torch.float16:
            raise ValueError(
                'master="split" keeps the lower half of an fp32 number of which a bf16 parameter is the upper one, '
                'and a parameter is fp16; use master="fp32"'
            )
        return KEYS[self.master]

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """Of its moments: what was asked for, or that of whatever the rule moves."""
        if self.moments is not None:
            return self.moments
        return parameter.dtype if self.key_for(parameter) is None else torch.float32


def keeping_of(moments: torch.dtype | None, master: Literal["fp32", "split"] | None) -> Keeping:
    """The constructor's arguments, checked."""
    if moments not in (None, torch.float32, torch.bfloat16, torch.float64):
        because = ", in which the squares of small gradients vanish" if moments == torch.float16 else ""
        raise ValueError(
            f"moments must be None, torch.float32, torch.bfloat16 or torch.float64, got {moments}{because}"
        )
    if master not in (None, *KEYS):
        raise ValueError(f'master must be None, "fp32" or "split", got {shown(master)}')
    return Keeping(moments, master)


def complete(state: State, parameter: Tensor, names: tuple[str, ...], counts_steps: bool, keeping: Keeping) -> None:
    """Make what is missing: a step of 0, moments of 0, a master that is the parameter."""
    if counts_steps and "step" not in state:
        taken = 0.0 if state.get(names[0]) is None else 1.0  # torch's SGD does not count
        state["step"] = torch.full((), taken, dtype=torch.float32, device=parameter.device)
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(
                parameter, dtype=keeping.dtype_for(parameter), memory_format=torch.preserve_format
            )
    key = keeping.key_for(parameter)
    if key is not None and key not in state:
        fresh = torch.zeros_like if key == "remainder" else torch.clone  # a parameter that was never moved is exact
        state[key] = fresh(parameter).to(_DTYPES[key]).detach()


def master_of(parameter: Tensor, state: State) -> Tensor | None:
    """The fp32 master; None if there is none."""
    if "master" in state:
        master: Tensor = state["master"]
        return master
    if "remainder" not in state:
        return None
    return _on_shards(join, parameter.detach(), state["remainder"])


def _on_shards(function: Callable[..., Tensor], *tensors: Any) -> Tensor:
    """An elementwise function of tensors, or of DTensors that are placed alike."""
    first = tensors[0]
    if not is_dtensor(first):
        return function(*tensors)
    local = function(*(tensor._local_tensor for tensor in tensors))
    made: Tensor = type(first).from_local(
        local, first.device_mesh, first.placements, run_check=False, shape=first.shape, stride=first.stride()
    )
    return made


class Sealed:
    """A tensor that torch's `load_state_dict` hands through."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def seal(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with every parameter's tensors sealed."""
    states = {
        key: {name: Sealed(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        if isinstance(state, dict)
        else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def unseal(state: State, parameter: Tensor, names: tuple[str, ...], keeping: Keeping) -> bool:
    """Bring a loaded state into its dtypes. Whether a master was dropped.

    A master is built at the next step where the checkpoint has none: the parameter may be loaded after its optimizer.
    """
    for name, value in state.items():
        if isinstance(value, Sealed):
            wanted = keeping.dtype_for(parameter) if name in names else None
            dtype = torch.float32 if name == "step" else wanted
            state[name] = value.tensor.to(device=parameter.device, dtype=dtype or value.tensor.dtype)
        elif name == "step":  # a number in checkpoints of torch before 1.12
            state[name] = torch.full((), float(value), dtype=torch.float32, device=parameter.device)
    loaded = {name: state.pop(name) for name in _DTYPES if name in state}
    kept = {name: value for name, value in loaded.items() if value.dtype == _DTYPES[name]}  # torch has cast the others
    key = keeping.key_for(parameter)
    if key in kept:
        state[key] = kept[key]
    elif key == "master" and "remainder" in kept:
        state[key] = master_of(parameter, kept)
    elif key == "remainder" and "master" in kept:
        state[key] = _on_shards(lambda master: split(master)[1], kept["master"])
    return bool(loaded) and key is None


def warn_dropped(count: int, by: str) -> None:
    if count:
        warnings.warn(
            f"fusedclip: {by} has no place for the fp32 masters of {count} parameters; they are dropped, and training "
            "goes on from the rounded parameters",
            stacklevel=user_stacklevel(),
        )
