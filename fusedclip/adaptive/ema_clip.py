"""EMAClip: each parameter is held to a multiple of its gradient's average norm, as in OLMo."""

import torch
from torch import Tensor

from ..norms import EPS
from ..rules import AdaptiveEachRule, Proposal, State
from .options import fraction, number


class EMAClip(AdaptiveEachRule):
    """Clip each gradient to `max_norm_ratio` times the moving average of its clipped norms::

        average[i] = norm[i]                                   # at its first step
        h[i] = min(1, max_norm_ratio * average[i] / (norm[i] + 1e-6))
        average[i] += (1 - beta) * (h[i] * norm[i] - average[i])

    Args:
        max_norm_ratio: how far above its average a norm may be; OLMo has no default.
        beta: weight of the past; OLMo takes the larger of the optimizer's two betas, 0.95 in its configurations.

    OLMo keeps the average from the second step on, to spare optimizers a state before their own; here it begins with
    the first. A parameter without a gradient, or with one of zeros, keeps its average.

    Source: `_do_adaptive_clipping` in olmo/optim.py of allenai/OLMo.
    """

    def __init__(self, max_norm_ratio: float, beta: float = 0.95) -> None:
        super().__init__(max_norm_ratio=number(max_norm_ratio, "max_norm_ratio"), beta=fraction(beta, "beta"))

    def fresh(self, device: torch.device) -> State:
        return {"average": torch.full((len(self._sizes or ()),), torch.inf, dtype=torch.float64, device=device)}

    def propose_each(self, norm: Tensor, each: Tensor, state: State) -> Proposal:
        average = torch.where(state["average"].isinf(), each, state["average"])
        limit = self.options["max_norm_ratio"] * average
        coef = torch.where(each > 0, (limit / (each + EPS)).clamp(max=1.0), torch.where(each == 0, 1.0, each))
        moved = average + (1 - self.options["beta"]) * (coef * each - average)
        return Proposal(coef, limit, {"average": torch.where(each > 0, moved, state["average"])})
