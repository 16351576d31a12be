"""AdaGC: each tensor is held to its own running norm."""

import torch
from torch import Tensor

from ..norms import ClipRule
from ..rules import AdaptiveEachRule, Proposal, State
from .options import count, fraction, number


class AdaGC(AdaptiveEachRule):
    """Clip each gradient to `lambda_rel` times the moving average of its own clipped norms::

        # the first warmup_steps: all gradients by the global norm
        h = min(1, lambda_abs / norm_of_all);   gamma[i] = min(gamma[i], h * norm[i])
        # then
        h[i] = min(1, lambda_rel * gamma[i] / norm[i])
        gamma[i] = beta * gamma[i] + (1 - beta) * h[i] * norm[i]

    Args:
        lambda_abs: the limit of the global norm during warm-up.
        lambda_rel: how far above its average a gradient's norm may be.
        beta: weight of the past in the averages.
        warmup_steps: how long the global norm rules.

    A parameter without a gradient, or with one of zeros, keeps its gamma (by the formula a single zero in warm-up would
    clip it to zeros for ever after); one that is first seen after warm-up begins with its own norm.

    Source: Wang et al., "AdaGC: Enhancing LLM pretraining stability via adaptive gradient clipping", ICML 2026,
    arXiv:2502.11034v2. The authors' PaddlePaddle code differs: its warm-up takes the norms before clipping for gamma,
    and its defaults are 1.04 and 0.99.
    """

    def __init__(
        self, lambda_abs: float = 1.0, lambda_rel: float = 1.05, beta: float = 0.98, warmup_steps: int = 100
    ) -> None:
        super().__init__(
            lambda_abs=number(lambda_abs, "lambda_abs"),
            lambda_rel=number(lambda_rel, "lambda_rel"),
            beta=fraction(beta, "beta"),
            warmup_steps=count(warmup_steps, "warmup_steps", least=0),
        )

    def fresh(self, device: torch.device) -> State:
        gamma = torch.full((len(self._sizes or ()),), torch.inf, dtype=torch.float64, device=device)
        return {"gamma": gamma, "count": torch.zeros((), dtype=torch.int64, device=device)}

    def propose_each(self, norm: Tensor, each: Tensor, state: State) -> Proposal:
        gamma, seen, beta = state["gamma"], state["count"], self.options["beta"]
        warm = seen < self.options["warmup_steps"]
        limit = self.options["lambda_rel"] * gamma
        coef = torch.where(
            warm, ClipRule(self.options["lambda_abs"], eps=0.0)(norm), torch.where(each > limit, limit / each, 1.0)
        )
        clipped = coef * each
        moved = torch.where(gamma.isinf(), clipped, beta * gamma + (1 - beta) * clipped)
        moved = torch.where(warm, torch.minimum(gamma, clipped), moved)
        after = {"gamma": torch.where(each > 0, moved, gamma), "count": seen + 1}
        threshold = torch.where(warm, self.options["lambda_abs"], limit)
        return Proposal(coef, threshold, after)
