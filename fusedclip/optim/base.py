"""What our own optimizers have in common: clipping inside the step, states, checkpoints."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..arguments import check_max_norm, shown
from ..torch_internals import outside_graphs, refuse_tracing
from ..updates import UpdateRule
from .groups import LastStep
from .limits import Limits, measure
from .moving import move, prepare
from .states import KEYS, Keeping, master_of, seal, unseal, warn_dropped

Params = Any  # torch's ParamsT


class ClippingOptimizer(Optimizer, LastStep):
    """An optimizer that reads each gradient for the norm, once more for the update, and never writes one."""

    _own_keys: frozenset[str] = frozenset()  # of states that torch's optimizer does not have, masters aside
    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling and skipping to the step

    def __init__(self, params: Params, defaults: dict[str, Any], limits: Limits, keeping: Keeping) -> None:
        self._limits, self._keeping, self.group_norms = limits, keeping, {}
        # torch's, for its own use after loading
        super().__init__(params, {**defaults, "foreach": None, "differentiable": False, "fused": True})

    @abstractmethod
    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        """What moves the parameters of a group. Raises for options that are none."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._rule(self.param_groups[-1])
            if param_group.get("max_norm") is not None:
                check_max_norm(param_group["max_norm"], 'the param group\'s "max_norm"')
            for parameter in param_group["params"]:
                self._keeping.key_for(parameter)
        except Exception:
            self.param_groups.pop()
            raise

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, and move every parameter that has a gradient. Never waits for a device.

        Whatever it raises, it raises before anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            refuse_tracing()
            with torch.no_grad():
                self._step()
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # a GradScaler takes them off again only if the step returns
                self.__dict__.pop(name, None)
            raise
        return loss

    def _step(self) -> None:
        groups = self.param_groups
        rules = [self._rule(group) for group in groups]
        calls = prepare(groups, rules, self.state, self._keeping)
        device = calls[0].streams.device if calls else torch.device("cpu")
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        measured = measure(groups, device, self._limits, scale, found_inf)
        move(calls, measured)
        self.total_norm, self.clip_coef, self.group_norms = measured.results

    def master_of(self, parameter: Tensor) -> Tensor:
        """The fp32 master of one of the parameters: with master="fp32" the one that is kept, with "split" a copy.

        Raises KeyError if it has none (yet): masters are made at the first step, for bf16 and fp16 parameters. Raises
        ValueError for a split one whose model has become fp16 since.
        """
        kept = self._keeping.key_for(parameter) is not None
        master = master_of(parameter, self.state.get(parameter, {})) if kept else None
        if master is None:
            raise KeyError(
                f"no master of this parameter ({parameter.dtype}): bf16 and fp16 ones have one from their first step "
                'on, if the optimizer was made with master="fp32" or "split"'
            )
        return master

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this optimizer or of torch's.

        States get the dtypes that this optimizer keeps them in: exactly what was saved where the options are the same.
        Masters that the checkpoint has not are built from the parameters at the next step; if it has some and this
        optimizer keeps none, a warning says so. A group's "max_norm" stays where the checkpoint names none. If it
        raises, nothing has been loaded.
        """
        limits = [group["max_norm"] for group in self.param_groups if "max_norm" in group]
        limits = [group.get("max_norm") for group in self.param_groups] if limits else []
        before = self.state, self.param_groups
        first = self.register_load_state_dict_post_hook(lambda _: self._unseal(limits), prepend=True)
        last = self.register_load_state_dict_pre_hook(lambda _, loaded: seal(loaded))
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            first.remove()
            last.remove()

    def _unseal(self, limits: list[Any]) -> None:
        dropped = 0
        for i, group in enumerate(self.param_groups):
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if limits and limits[i] is not None:
                group.setdefault("max_norm", limits[i])
            names = self._rule(group).states
            for parameter in group["params"]:
                if parameter in self.state:
                    dropped += unseal(self.state[parameter], parameter, names, self._keeping)
        warn_dropped(dropped, "this optimizer, made without master=,")

    def torch_state_dict(self) -> dict[str, Any]:
        """The state_dict as torch's optimizer has it, which loads `state_dict()` too, but keeps what it does not know.

        A warning tells of masters, which it drops.
        """
        whole = self.state_dict()
        masters = {*KEYS.values()}
        dropped = sum(bool(masters & state.keys()) for state in whole["state"].values())
        own = masters | self._own_keys
        whole["state"] = {
            key: {name: value for name, value in state.items() if name not in own}
            for key, state in whole["state"].items()
        }
        for group in whole["param_groups"]:
            group.pop("max_norm", None)
        warn_dropped(dropped, "a torch optimizer")
        return whole

    def __getstate__(self) -> dict[str, Any]:
        names = ("_limits", "_keeping", "total_norm", "clip_coef", "group_norms")
        whole: dict[str, Any] = super().__getstate__()
        return {**whole, **{name: self.__dict__[name] for name in names if name in self.__dict__}}


def number_at_least_0(value: Any, name: str) -> float:
    """An option of a param group as a float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {number}; it must be at least 0 and finite")
    return number


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """As a number, or a tensor of one element, whose value is not looked at unless it is on the CPU."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return number_at_least_0(lr, "lr")
    if lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got {shown(lr)}")
    return number_at_least_0(lr.item(), "lr") if lr.is_cpu else lr
