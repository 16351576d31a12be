"""The methods again, as their papers and repositories have them: plain floats, one step after another.

`step` takes the norm of each gradient, None where there is none, and returns what each gradient is multiplied by.
"""

import math
from collections.abc import Sequence

import numpy as np

Norms = Sequence[float | None]


def total(each: Norms) -> float:
    return math.sqrt(sum(norm * norm for norm in each if norm is not None))


def torchs(norm: float, limit: float) -> float:
    """The coefficient of clip_grad_norm_."""
    coef = limit / (norm + 1e-6)
    return 1.0 if coef >= 1 else coef


class AutoClip:
    def __init__(self, percentile: float = 10.0, window: int | None = None) -> None:
        self.percentile, self.window, self.history = percentile, window, list[float]()

    def step(self, each: Norms) -> list[float]:
        norm = total(each)
        seen = [*self.history, norm][-(self.window or 10**9) :]
        if math.isfinite(norm):
            self.history = seen
            return [torchs(norm, float(np.percentile(seen, self.percentile)))] * len(each)
        return [0.0 if norm == math.inf else math.nan] * len(each)


class ZClip:
    def __init__(
        self, mode: str = "zscore", clip_option: str = "adaptive_scaling", clip_factor: float = 1.0,
        max_grad_norm: float | None = 1.0, warmup_steps: int = 25, skip_update_on_spike: bool = False,
    ) -> None:  # fmt: skip
        self.mode, self.option, self.factor, self.most = mode, clip_option, clip_factor, max_grad_norm or math.inf
        self.warmup, self.skip, self.buffer, self.ready = warmup_steps, skip_update_on_spike, list[float](), False
        self.mean = self.var = 0.0

    def step(self, each: Norms) -> list[float]:
        norm = total(each)
        if not math.isfinite(norm):
            unlimited = self.most == math.inf and (norm != norm or not self.ready)  # no comparison finds a limit
            return [1.0 if unlimited else 0.0 if norm == math.inf else math.nan] * len(each)
        if not self.ready:
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup:
                self.mean = math.fsum(self.buffer) / len(self.buffer)
                self.var = math.fsum((x - self.mean) ** 2 for x in self.buffer) / len(self.buffer)
                self.ready = True
            return [torchs(norm, self.most)] * len(each)
        limit = self.limit(norm)
        effective = min(norm if limit is None else limit, self.most)
        if limit is None or not self.skip:
            x = norm if limit is None else limit
            self.mean = 0.97 * self.mean + 0.03 * x
            self.var = 0.97 * self.var + 0.03 * (x - self.mean) ** 2
        return [effective / (norm + 1e-6) if norm > effective else 1.0] * len(each)

    def limit(self, norm: float) -> float | None:
        std = self.var**0.5
        if self.mode == "percentile":
            return self.mean + 2.5 * std if norm > self.mean + 2.5 * std else None
        z = (norm - self.mean) / (std + 1e-6)
        if z <= 2.5:
            return None
        return (self.mean + 2.5 * std / (z / 2.5)) * self.factor if self.option == "adaptive_scaling" else self.mean


class AdaGC:
    def __init__(self, lambda_rel: float = 1.05, warmup_steps: int = 100) -> None:
        self.rel, self.warmup, self.steps = lambda_rel, warmup_steps, 0
        self.gamma: dict[int, float] = {}

    def step(self, each: Norms) -> list[float]:
        norm = total(each)
        warm = self.steps < self.warmup
        coefs = [1.0] * len(each)
        after = dict(self.gamma)
        for i, own in enumerate(each):
            own = 0.0 if own is None else own
            if warm:
                coefs[i] = min(1.0, 1.0 / norm) if norm == norm and norm > 0 else (math.nan if norm != norm else 1.0)
                after[i] = min(self.gamma.get(i, math.inf), coefs[i] * own)
            else:
                limit = self.rel * self.gamma.get(i, math.inf)
                coefs[i] = limit / own if own > limit else 1.0
                after[i] = 0.98 * self.gamma.get(i, coefs[i] * own) + 0.02 * coefs[i] * own
            if own == 0:  # not by the formula: a zero would be the limit for ever
                after.pop(i)
                after |= {i: self.gamma[i]} if i in self.gamma else {}
        if math.isfinite(norm):
            self.gamma, self.steps = after, self.steps + 1
        return coefs


class EMAClip:
    def __init__(self, max_norm_ratio: float, beta: float = 0.95) -> None:
        self.ratio, self.beta, self.average = max_norm_ratio, beta, dict[int, float]()

    def step(self, each: Norms) -> list[float]:
        coefs, after = [], dict(self.average)
        for i, own in enumerate(each):
            if not own:
                coefs.append(1.0)
                continue
            average = self.average.get(i, own)
            coefs.append(own if own != own else min(1.0, self.ratio * average / (own + 1e-6)))
            after[i] = average + (1 - self.beta) * (coefs[i] * own - average)
        if math.isfinite(total(each)):
            self.average = after
        return coefs


class SkipSpikes:
    def __init__(self, factor: float = 5.0, patience: int = 3) -> None:
        self.factor, self.patience = factor, patience
        self.mean, self.count, self.streak, self.skipped = 0.0, 0, 0, 0

    def step(self, each: Norms) -> list[float]:
        norm, warm = total(each), self.count < 25
        beyond = not warm and norm > self.factor * self.mean
        if not math.isfinite(norm) or (beyond and self.streak < self.patience):
            self.streak, self.skipped = self.streak + 1, self.skipped + 1
        else:
            if beyond:
                self.mean = norm
            elif warm:
                self.mean += (norm - self.mean) / (self.count + 1)
            else:
                self.mean = 0.97 * self.mean + 0.03 * norm
            self.count, self.streak = self.count + 1, 0
        return [1.0] * len(each)
