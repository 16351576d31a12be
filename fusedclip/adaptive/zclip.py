"""ZClip: a norm far above its running mean, in units of its running deviation, is pulled back."""

from typing import Literal

import torch
from torch import Tensor

from ..norms import ClipRule
from ..rules import AdaptiveRule, Proposal, State
from .options import count, fraction, number


class ZClip(AdaptiveRule):
    """Clip norms whose z-score is above `z_thresh`::

        z = (norm - mean) / (std + eps)                        # after warm-up
        if z > z_thresh:  limit = (mean + z_thresh * std / (z / z_thresh)) * clip_factor
        x = limit if z > z_thresh else norm                    # not held to max_grad_norm
        mean = alpha * mean + (1 - alpha) * x
        var  = alpha * var  + (1 - alpha) * (x - mean) ** 2

    Args:
        alpha: weight of the past in both averages.
        z_thresh: deviations above the mean from which a norm is a spike.
        max_grad_norm: a limit for every step beside; None for none.
        eps: added to the deviation.
        warmup_steps: so many norms make the first mean and (population) variance; meanwhile only `max_grad_norm` clips.
        mode: "zscore" as above; "percentile" clips to mean + z_thresh * std.
        clip_option: in "zscore": "adaptive_scaling" as above, or "mean": a spike is clipped to the mean.
        clip_factor: multiplies the limit of "adaptive_scaling".
        skip_update_on_spike: a spike leaves mean and variance as they are.

    Names, defaults and formulas are those of the repository bluorion-com/ZClip, which has `max_grad_norm=1.0` where
    the paper has no other limit. Where a threshold is below 0 the repository turns the gradients around; here it is 0.

    Source: Kumar, Owen, Chowdhury and Guera 2025, "ZClip: Adaptive spike mitigation for LLM pre-training",
    arXiv:2504.02507.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | None = 1.0,
        eps: float = 1e-6,
        warmup_steps: int = 25,
        mode: Literal["zscore", "percentile"] = "zscore",
        clip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
    ) -> None:
        if mode not in ("zscore", "percentile"):
            raise ValueError(f"mode must be 'zscore' or 'percentile', got {mode!r}")
        if clip_option not in ("adaptive_scaling", "mean"):
            raise ValueError(f"clip_option must be 'adaptive_scaling' or 'mean', got {clip_option!r}")
        super().__init__(
            alpha=fraction(alpha, "alpha"),
            z_thresh=number(z_thresh, "z_thresh", above=True),
            max_grad_norm=None if max_grad_norm is None else number(max_grad_norm, "max_grad_norm"),
            eps=number(eps, "eps"),
            warmup_steps=count(warmup_steps, "warmup_steps"),
            mode=mode,
            clip_option=clip_option,
            clip_factor=number(clip_factor, "clip_factor"),
            skip_update_on_spike=bool(skip_update_on_spike),
        )

    def fresh(self, device: torch.device) -> State:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return {"mean": zero, "var": zero.clone(), "count": torch.zeros((), dtype=torch.int64, device=device)}

    def propose(self, norm: Tensor, state: State) -> Proposal:
        seen = state["count"]
        warm = seen < self.options["warmup_steps"]
        limit = torch.where(warm, torch.inf, self._limit(norm, state))
        spike = limit < torch.inf
        if self.options["max_grad_norm"] is not None:
            threshold = limit.clamp(max=self.options["max_grad_norm"])
        else:
            threshold = limit
        collected, moved = _collect(norm, state), self._move(torch.where(spike, limit, norm), state)
        after = {name: torch.where(warm, collected[name], moved[name]) for name in moved}
        if self.options["skip_update_on_spike"]:
            after = {name: torch.where(spike, state[name], value) for name, value in after.items()}
        return Proposal(ClipRule(threshold)(norm), threshold, {**after, "count": seen + 1})

    def _limit(self, norm: Tensor, state: State) -> Tensor:
        """For this norm: inf if it is no spike."""
        mean, std, z_thresh = state["mean"], state["var"].sqrt(), self.options["z_thresh"]
        if self.options["mode"] == "percentile":
            limit = mean + z_thresh * std
            return torch.where(norm > limit, limit, torch.inf)
        z = (norm - mean) / (std + self.options["eps"])
        limit = mean
        if self.options["clip_option"] == "adaptive_scaling":
            limit = ((mean + z_thresh * std / (z / z_thresh)) * self.options["clip_factor"]).clamp(min=0)
        return torch.where(z > z_thresh, limit, torch.inf)

    def _move(self, x: Tensor, state: State) -> State:
        alpha = self.options["alpha"]
        mean = alpha * state["mean"] + (1 - alpha) * x
        return {"mean": mean, "var": alpha * state["var"] + (1 - alpha) * (x - mean) ** 2}


def _collect(norm: Tensor, state: State) -> State:
    """Mean and population variance with one more norm."""
    seen = state["count"]
    mean = state["mean"] + (norm - state["mean"]) / (seen + 1)
    return {"mean": mean, "var": (state["var"] * seen + (norm - state["mean"]) * (norm - mean)) / (seen + 1)}
