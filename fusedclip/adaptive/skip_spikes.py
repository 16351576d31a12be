"""SkipSpikes: a step whose norm is far beyond what is usual, or not finite, is left out."""

import warnings
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from ..arguments import check_max_norm
from ..later import Later
from ..norms import ClipRule
from ..rules import AdaptiveRule, Proposal, State
from ..torch_internals import user_stacklevel
from .options import count, fraction, number


class Told(NamedTuple):
    """What the host knows of a step, one step later."""

    norm: float
    limit: float
    skipped: bool
    streak: int  # steps left out in a row, up to this one


class SkipSpikes(AdaptiveRule):
    """Leave out a step whose norm is NaN, inf or more than `factor` times the running mean of the steps taken::

        skip = not isfinite(norm) or (norm > factor * mean and streak < patience)
        streak = streak + 1 if skip else 0
        if not skip:  mean = beta * mean + (1 - beta) * norm

    A step is left out by `found_inf`: parameters and optimizer state stay as they are, which zeros for gradients would
    not do (momentum and weight decay go on). So it needs `clip_on_step` with a fused Adam, AdamW, SGD or Adagrad, or a
    GradScaler (which takes any step left out for an overflow, and lowers its scale). `clip_` by itself cannot: it clips
    to `max_norm` what is no spike and says whether this is one (1 or 0, fp32, 0-d, on the device), for an optimizer
    that takes `found_inf`, or to be read; the norm is `total_norm`.

    Args:
        factor: of the mean, from which a norm is a spike.
        patience: so many steps in a row may be left out as spikes. The next one that is finite is taken, and the mean
            begins anew with it: a level that stays is no spike.
        beta: weight of the past in the mean.
        warmup_steps: so many finite norms make the first mean, and none is a spike.
        max_norm: a limit to which steps that are taken are clipped, as in `fusedclip.clip_grad_norm_`.

    Streaks are counted on the device. The host is told a step later, without waiting: `told` is what it knows, and a
    warning says so when `patience` steps in a row have been left out.
    """

    skips = True
    told: Told | None = None
    _flag: Tensor | None = None  # of the last step, if it had gradients

    def __init__(
        self,
        factor: float = 5.0,
        patience: int = 3,
        *,
        beta: float = 0.97,
        warmup_steps: int = 25,
        max_norm: SupportsFloat = torch.inf,
    ) -> None:
        limit = check_max_norm(max_norm)
        super().__init__(
            factor=number(factor, "factor", 1.0, above=True),
            patience=count(patience, "patience", least=0),
            beta=fraction(beta, "beta"),
            warmup_steps=count(warmup_steps, "warmup_steps"),
            max_norm=number(limit, "max_norm"),
        )
        self._later = Later()

    def fresh(self, device: torch.device) -> State:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        mean = torch.zeros((), dtype=torch.float64, device=device)
        return {"mean": mean, "count": zero, "streak": zero.clone(), "skipped": zero.clone()}

    @property
    def streak(self) -> Tensor | None:
        """Steps left out in a row, up to now: int64, 0-d, on the device."""
        return self._state.get("streak")

    @property
    def skipped(self) -> Tensor | None:
        """Steps left out so far: int64, 0-d, on the device."""
        return self._state.get("skipped")

    def _answer(self, norm: Tensor) -> Tensor:
        return norm.new_zeros((), dtype=torch.float32) if self._flag is None else self._flag

    def propose(self, norm: Tensor, state: State) -> Proposal:
        mean, seen, streak = state["mean"], state["count"], state["streak"]
        warm = seen < self.options["warmup_steps"]
        limit = torch.where(warm, torch.inf, self.options["factor"] * mean)
        beyond = norm > limit
        skip = ~norm.isfinite() | (beyond & (streak < self.options["patience"]))
        beta = self.options["beta"]
        moved = torch.where(warm, mean + (norm - mean) / (seen + 1), beta * mean + (1 - beta) * norm)
        moved = torch.where(beyond, norm, moved)  # taken all the same: a new level
        after = {
            "mean": torch.where(skip, mean, moved),
            "count": torch.where(skip, seen, seen + 1),
            "streak": torch.where(skip, streak + 1, 0),
            "skipped": state["skipped"] + skip,
        }
        coef = torch.where(skip, 1.0, ClipRule(self.options["max_norm"])(norm))
        return Proposal(coef, limit, after, skip)

    def settle(self, skipped: Tensor | None = None) -> Tensor | None:
        pending = self._pending
        self._flag = flag = super().settle(skipped)
        if pending is not None and flag is not None:
            self._tell()
            norm, proposal = pending
            self._later.send(torch.stack([norm, proposal.threshold, flag.double(), self._state["streak"].double()]))
        return flag

    def _enters(self, norm: Tensor, proposal: Proposal, skipped: Tensor | None) -> Tensor:
        assert proposal.skip is not None
        return torch.ones_like(proposal.skip) if skipped is None else proposal.skip | ~skipped

    def _tell(self) -> None:
        for _, (norm, limit, skipped, streak) in self._later.arrived():
            self.told = Told(norm, limit, bool(skipped), int(streak))
            if skipped and streak == max(self.options["patience"], 1):
                warnings.warn(
                    f"SkipSpikes has left out {int(streak)} steps in a row; the last norm was {norm:g}, and more than "
                    f"{limit:g} is a spike",
                    stacklevel=user_stacklevel(),
                )
