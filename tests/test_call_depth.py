"""How far it is from `clip_grad_norm_` to an engine, which is most of what a small clip costs."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch

import fusedclip

from .conftest import Engine, engines, parameters


class Profile:
    """What one clip runs: Python frames on top of each other, and of each call into C, how many it was made from."""

    def __init__(
        self,
        held: list[torch.nn.Parameter],
        limit: float,
        clip: Callable[[list[torch.nn.Parameter], float], object] = fusedclip.clip_grad_norm_,
    ) -> None:
        self.deepest = self._depth = 0
        self.into_c: list[tuple[str, int]] = []
        clip(held, limit)  # fills the caches
        for parameter in held:
            parameter.grad.fill_(1.0)  # type: ignore[union-attr]
        sys.setprofile(self._see)
        try:
            clip(held, limit)
        finally:
            sys.setprofile(None)
        self.into_c.pop()  # setprofile

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call":
            self.into_c.append((str(getattr(argument, "__name__", argument)), self._depth))
        elif event in ("call", "return"):
            self._depth += 1 if event == "call" else -1
            self.deepest = max(self.deepest, self._depth)

    def depths(self, *names: str) -> list[int]:
        return [depth for name, depth in self.into_c if name in names]


@pytest.mark.parametrize("limit", [1e9, 1e-3], ids=["not clipped", "clipped"])
@engines("cpu")
def test_an_ordinary_list_is_one_call_of_the_extension(engine: Engine, limit: float) -> None:
    profile = Profile(parameters([torch.ones(256) for _ in range(10)]), limit)
    assert profile.depths("cpu_clip_list") == [3]
    assert profile.depths("gather", "cpu_clip", "cpu_lift", "cpu_scale") == []
    assert profile.deepest <= 4
    told = len(profile.depths("_increment_version"))
    assert told == (limit < 1)
    assert len(profile.into_c) - told <= 5


@pytest.mark.parametrize("limit", [1e9, 1e-3], ids=["not clipped", "clipped"])
@engines("cpu")
def test_with_a_known_norm_too(engine: Engine, limit: float) -> None:
    held, norm = parameters([torch.ones(256) for _ in range(10)]), torch.tensor(50.0)
    profile = Profile(held, limit, lambda held, limit: fusedclip.clip_grads_with_norm_(held, limit, norm))
    assert profile.depths("cpu_scale_list") == [4]  # one of them is the lambda
    assert profile.depths("gather", "cpu_clip_list", "cpu_scale", "scalar_tensor") == []
    told = len(profile.depths("_increment_version"))
    assert told == (limit < 1)
    assert len(profile.into_c) - told <= 6


@engines("cuda")
def test_a_list_on_a_gpu_is_swept_once_and_clipped_in_one_call(engine: Engine) -> None:
    profile = Profile(parameters([torch.ones(256, device=engine.device) for _ in range(10)]), 1e9)
    assert len(profile.depths("gather", "cpu_clip_list")) == 1
    assert profile.depths("cuda_clip") == [4]  # three below clip_grad_norm_
    assert profile.depths("cuda_lift", "cuda_norm", "cuda_scale") == []
