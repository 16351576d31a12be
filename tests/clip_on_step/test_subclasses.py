"""Steps of subclasses, which may do anything and call their parent's."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from fusedclip.optim import clip_on_step

from .optimizers import assert_same, give_gradients, held, pair


def test_a_step_that_calls_its_parents_clips_once_and_sees_itself() -> None:
    class Counting(AdamW):
        calls = 0
        optimizer = "another one"

        def step(self, closure: Any = None) -> Any:
            type(self).calls += 1
            self.passing = 1
            del self.passing
            assert self.optimizer == "another one"  # wrappers of an optimizer keep it under this name
            assert self is ours or self is theirs  # no stand-in
            return self.really(closure)

        def really(self, closure: Any) -> Any:
            return super().step(closure)

    pair(AdamW)  # torch hooks AdamW.step as well now: our hook runs twice in a step
    ours, theirs = pair(Counting, fused=True)
    handle = clip_on_step(ours, 0.1)
    for _ in range(2):
        give_gradients(ours, theirs)
        norm = nn.utils.clip_grad_norm_(held(theirs), 0.1)
        ours.step()
        theirs.step()
        torch.testing.assert_close(handle.total_norm, norm)
    assert Counting.calls == 4
    assert_same(ours, theirs)


@pytest.mark.parametrize("asked", [{"defer": True}, {"on_nonfinite": "skip"}])
def test_subclasses_of_fused_optimizers_may_do_anything_and_are_only_scaled(asked: dict[str, Any]) -> None:
    class Own(SGD):
        pass

    ours, _ = pair(Own, fused=True)
    with pytest.raises(ValueError, match="this Own has none"):
        clip_on_step(ours, 0.1, **asked)


def test_a_step_that_raised_does_not_count_as_under_way() -> None:
    class Failing(SGD):
        fail = True

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise KeyError
            return super().step(closure)

    ours, theirs = pair(Failing)
    clip_on_step(ours, 0.1)
    give_gradients(ours, theirs)
    with pytest.raises(KeyError):
        ours.step()
    Failing.fail = theirs.fail = False
    give_gradients(ours, theirs)
    nn.utils.clip_grad_norm_(held(theirs), 0.1)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_arguments_of_a_step_that_are_no_closures_arrive() -> None:
    seen = []

    class Scaled(SGD):
        def step(self, lr_scale: float, metrics: dict[str, int], closure: Any) -> Any:
            seen.append((lr_scale, metrics))
            return super().step(closure)

    ours, theirs = pair(Scaled)
    clip_on_step(ours, 0.1)

    def closure() -> float:
        give_gradients(ours, theirs)
        return 0.0

    ours.step(0.5, {"loss": 1}, closure)
    assert seen == [(0.5, {"loss": 1})]
    nn.utils.clip_grad_norm_(held(theirs), 0.1)
    theirs.step(0.5, {}, None)
    assert_same(ours, theirs)
