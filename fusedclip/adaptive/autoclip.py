"""AutoClip: the limit is a percentile of all norms so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..norms import ClipRule
from ..rules import AdaptiveRule, Proposal, State
from .options import count, number

_FIRST = 1024  # norms, before the history grows


class AutoClip(AdaptiveRule):
    """Clip to a percentile of the norms so far, the current one included::

        history.append(norm)
        limit = numpy.percentile(history, percentile)
        clip_grad_norm_(parameters, limit)

    Args:
        percentile: 0 to 100. 10, the paper's, clips nine steps of ten; for a short window its author suggests 80.
        window: the last so many norms only. None, as in the paper: all of them.

    An unbounded history lies on the device, sorted: 8 bytes per step, and each step moves all of it (on a CPU 0.1 ms
    after 1,000 steps, 0.6 ms after 100,000, 30 ms after a million). A window of W norms is sorted at each step.

    Source: Seetharaman, Wichern, Pardo and Le Roux 2020, "AutoClip: Adaptive gradient clipping for source separation
    networks", arXiv:2007.14469; the repository pseeth/autoclip does the same.
    """

    shaping = ("window",)

    def __init__(self, percentile: float = 10.0, window: int | None = None) -> None:
        percentile = number(percentile, "percentile", 0.0, 100.0)
        super().__init__(percentile=percentile, window=None if window is None else count(window, "window"))
        self._fraction, self._window = percentile / 100, window
        self._steps = 0  # at least as many as have entered the state, which the host does not know

    def fresh(self, device: torch.device) -> State:
        empty = torch.full((self._window or _FIRST,), torch.inf, dtype=torch.float64, device=device)
        return {"history": empty, "count": torch.zeros((), dtype=torch.int64, device=device)}

    def propose(self, norm: Tensor, state: State) -> Proposal:
        history, seen, finite = state["history"], state["count"], norm.isfinite()
        places = torch.arange(len(history), device=history.device)
        if self._window is None:
            history = ordered = _insert(history, torch.where(finite, norm, torch.inf), places)
        else:
            history = torch.where(finite & (places == seen % self._window), norm, history)
            ordered = history.sort().values  # what is not filled yet is inf, and last
        filled = (seen + finite).clamp(min=1, max=len(history))
        limit = _percentile(ordered, filled, self._fraction)
        return Proposal(ClipRule(limit)(norm), limit, {"history": history, "count": seen + 1})

    def settle(self, skipped: Tensor | None = None) -> Tensor | None:
        answer = super().settle(skipped)
        if self._state and self._window is None:
            self._steps += 1
            self._grow()
        return answer

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self._steps = saved.get("steps", 0)

    def _grow(self) -> None:
        history = self._state["history"]
        if self._steps >= len(history):
            self._state["history"] = torch.cat([history, torch.full_like(history, torch.inf)])


def _insert(history: Tensor, norm: Tensor, places: Tensor) -> Tensor:
    """A sorted history with one more norm; the last entry, an inf, makes room."""
    place = torch.searchsorted(history, norm)
    moved = history.roll(1)
    return torch.where(places < place, history, torch.where(places == place, norm, moved))


def _percentile(ordered: Tensor, filled: Tensor, fraction: float) -> Tensor:
    """numpy's, by linear interpolation, of the first `filled` of them."""
    position = (filled - 1) * torch.full((), fraction, dtype=torch.float64, device=ordered.device)
    below = position.floor()
    weight, below = position - below, below.long()
    above = torch.minimum(below + 1, filled - 1)
    low, high = ordered.take(below), ordered.take(above)
    return torch.where(weight == 0, low, low + weight * (high - low))
