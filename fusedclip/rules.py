"""What all adaptive rules share: a state on the device that a step enters when it is over, unless it was skipped.

A rule proposes: coefficients, the threshold and the state after this step, from what was measured and the state before
it. Nothing is kept until `settle`, which every step calls once, when it is known whether it is taken: with a
`torch.where`, so that the host need not know.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import passes, reading
from .arguments import Limit, Tensors, check_max_norm, parameter_list, shown
from .gradients import gather_given
from .norms import ClipRule, EachRule, Rule
from .peers import Elsewhere, Group, check_group
from .torch_internals import outside_graphs, refuse_tracing
from .transfers import follow

State = dict[str, Tensor]


class Proposal(NamedTuple):
    """What a rule would do, if the step is taken."""

    coef: Tensor  # fp64
    threshold: Tensor
    state: State  # after the step; entries that stay as they are may be left out
    skip: Tensor | None = None  # whether the rule wants the step left out: bool, 0-d


class AdaptiveRule(ABC):
    """A limit that follows the norms it has seen.

    A subclass names its options (`self.options`, numbers and strings by name), begins with `fresh` and implements
    `propose`. It may be given wherever a limit is: to `clip_`, and as `max_norm` to `clip_on_step`,
    `amp.unscale_and_clip_grad_norm_` and a `GradMonitor`.
    """

    zero_nonfinite = False
    skips = False  # whether it may want a step left out
    shaping: Sequence[str] = ()  # options on which the shape of the state depends
    total_norm: Tensor | None = None
    """What the last `clip_` returned, or would have."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._state: State = {}
        self._pending: tuple[Tensor, Proposal] | None = None
        self._last: Tensor | None = None

    @abstractmethod
    def fresh(self, device: torch.device) -> State:
        """The state before the first step."""

    @abstractmethod
    def propose(self, norm: Tensor, state: State) -> Proposal:
        """From the norm of all gradients, fp64 and 0-d, and the state on its device, which stays as it is."""

    @property
    def threshold(self) -> Tensor | None:
        """What the last step that entered the state was held to: fp64, on the device; None before the first."""
        return self._last

    @outside_graphs
    def clip_(
        self,
        parameters: Tensors,
        *,
        group: Group | None = None,
        counted_elsewhere: Elsewhere | None = None,
        grad_attr: str = "grad",
    ) -> Tensor:
        """Clip the gradients in place, and let the norm enter the state if it is finite.

        Arguments and errors are those of `fusedclip.clip_grad_norm_`.

        Returns:
            The norm before clipping, of order 2: 0-d, fp32 (fp64 if any gradient is), on the first gradient's device.
            Does not wait for the device. (`SkipSpikes`: whether it was a spike.)
        """
        refuse_tracing()
        peers = check_group(group, counted_elsewhere)
        items = parameter_list(parameters, grad_attr)
        grads = gather_given(items, grad_attr, peers=peers)
        self.bind(items)
        norm = passes.clip_(grads, 2.0, self, dtype=torch.float64).norm
        self.settle()
        self.total_norm = reading.as_result(norm, grads)
        return self._answer(self.total_norm)

    def _answer(self, norm: Tensor) -> Tensor:
        """What `clip_` returns."""
        return norm

    def __call__(self, norm: Tensor) -> Tensor:
        """The coefficient for this norm. Asking again changes nothing."""
        return self._note(norm, self.propose(norm, self._on(norm.device)))

    def settle(self, skipped: Tensor | None = None) -> Tensor | None:
        """The step is over: let it enter the state, unless it was left out (`skipped`: 0-d, not 0).

        Returns whether the rule itself wants it left out (fp32, 0-d, as `found_inf`), None if it never does.
        """
        if self._pending is None:
            return None  # there was nothing to clip
        (norm, proposal), self._pending = self._pending, None
        enters = self._enters(norm, proposal, None if skipped is None else follow(skipped, norm.device) != 0)
        for name, value in proposal.state.items():
            self._state[name] = torch.where(enters, value, self._state[name])
        last = self._last
        before = torch.full_like(proposal.threshold, torch.inf) if last is None else follow(last, norm.device)
        self._last = torch.where(enters, proposal.threshold, before)
        return None if proposal.skip is None else proposal.skip.float()

    def proposed_threshold(self) -> Tensor | None:
        """What the step that is not settled yet is held to."""
        return None if self._pending is None else self._pending[1].threshold

    def wants_skipped(self) -> Tensor | None:
        """What `settle` will return."""
        skip = None if self._pending is None else self._pending[1].skip
        return None if skip is None else skip.float()

    def bind(self, parameters: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        """Look at the parameters before they are measured: a rule with a state for each wants the same ones again."""
        self._pending = None  # of a step that an error ended

    def state_dict(self) -> dict[str, Any]:
        """The method, its options and its state: copies, on the device. The threshold begins anew after loading.

        Before the first step the state is on the CPU, whole all the same: torch.distributed.checkpoint loads only into
        what is there. (A rule that has a number for each parameter has to `bind` them before.)
        """
        before = self._state or self.fresh(torch.device("cpu"))
        state = {name: value.clone() for name, value in before.items()}
        return {"method": type(self).__name__, "options": dict(self.options), "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. The options stay those of this object.

        Raises:
            ValueError: for the state of another method or of other options that shape it, or one that lacks entries.
        """
        if not isinstance(saved, Mapping) or not {"method", "options", "state"} <= set(saved):
            raise ValueError(f"{type(self).__name__}.load_state_dict takes what its state_dict returned")
        if saved["method"] != type(self).__name__:
            raise ValueError(f"this is the state of {shown(saved['method'])}, not of {type(self).__name__}")
        for name in self.shaping:
            if saved["options"].get(name) != self.options[name]:
                raise ValueError(
                    f"the state of this {type(self).__name__} was saved with {name}={saved['options'].get(name)}; this "
                    f"one has {name}={self.options[name]}"
                )
        if saved["state"].keys() != self.fresh(torch.device("cpu")).keys():
            raise ValueError(
                f"this {type(self).__name__} state has other entries: {', '.join(saved['state']) or 'none'}"
            )
        self._state = {name: value.clone() for name, value in saved["state"].items()}
        self._pending = self._last = None

    def _on(self, device: torch.device) -> State:
        """The state, brought to this device."""
        if not self._state:
            self._state = self.fresh(device)
        elif next(iter(self._state.values())).device != device:
            self._state = {name: follow(value, device) for name, value in self._state.items()}
        return self._state

    def _note(self, norm: Tensor, proposal: Proposal) -> Tensor:
        self._pending = (norm, proposal)
        return proposal.coef

    def _enters(self, norm: Tensor, proposal: Proposal, skipped: Tensor | None) -> Tensor:
        """Whether the step enters the state: bool, 0-d."""
        finite = norm.isfinite()
        return finite if skipped is None else finite & ~skipped

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


class AdaptiveEachRule(EachRule, AdaptiveRule):
    """One that gives each gradient a coefficient of its own. Its state has a number for each entry of the list."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._names: list[str] | None = None
        self._sizes: list[int] | None = None

    @abstractmethod
    def propose_each(self, norm: Tensor, each: Tensor, state: State) -> Proposal:
        """From the norms of all gradients and of each, [T], which is 0 where there is no gradient; fp64."""

    def propose(self, norm: Tensor, state: State) -> Proposal:
        raise TypeError(f"{type(self).__name__} wants the norm of each gradient")

    def of_each(self, norm: Tensor, by_entry: Tensor) -> Tensor:
        return self._note(norm, self.propose_each(norm, by_entry, self._on(by_entry.device)))

    def bind(self, parameters: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        super().bind(parameters, names)
        sizes = [parameter.numel() for parameter in parameters]
        if not self._state and sizes != self._sizes:
            self._names = self._sizes = None  # of a list that was empty or refused
        if self._names is not None and names is not None and list(names) != self._names:
            raise ValueError(f"{type(self).__name__} has a state for each parameter, and {renamed(self._names, names)}")
        if self._sizes is not None and sizes != self._sizes:
            raise ValueError(
                f"{type(self).__name__} has a state for each of {len(self._sizes)} parameters, in order, and these "
                f"{len(parameters)} are others, by their number or sizes; give it the same list each time, or make "
                "another rule for this one"
            )
        self._sizes = sizes
        self._names = list(names) if names is not None else self._names

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sizes": self._sizes, "names": self._names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self._sizes, self._names = saved.get("sizes"), saved.get("names")
        if self._sizes is None:
            self._state = {}  # it was saved before anything was measured


def as_rule(max_norm: "Limit | AdaptiveRule", name: str = "max_norm") -> Rule:
    """An adaptive rule as it is; any other limit, checked, as a constant one."""
    return max_norm if isinstance(max_norm, AdaptiveRule) else ClipRule(check_max_norm(max_norm, name))


def renamed(saved: Sequence[str], here: Sequence[str]) -> str:
    """How two lists of names differ."""
    gone = [name for name in saved if name not in set(here)]
    new = [name for name in here if name not in set(saved)]
    if not gone and not new:
        return "the parameters are in another order than when it was saved"
    parts = [f"{_few(gone)} is not there any more"] * bool(gone) + [f"{_few(new)} was not there then"] * bool(new)
    return f"{' and '.join(parts)}; rename or add them in what was saved, or begin anew"


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
