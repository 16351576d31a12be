"""Nothing stays behind on the optimizer, in its copies or in memory."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from fusedclip.optim import ClipOnStep, clip_on_step

from .optimizers import assert_same, give_gradients, held, pair


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
def test_nothing_stays_on_the_optimizer(fails: bool, with_closure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, fresh = pair(AdamW, fused=True)
    give_gradients(ours, fresh)
    fresh.step()
    handle = clip_on_step(ours, 0.1, defer=True, on_nonfinite="skip")
    seen = []

    def failing(*args: Any, **kwargs: Any) -> None:
        seen.append((kwargs["grad_scale"], kwargs["found_inf"]))
        raise MemoryError

    if fails:
        monkeypatch.setattr(torch, "_fused_adamw_", failing)
        with pytest.raises(MemoryError):
            ours.step(*[lambda: 1.0] * with_closure)
        assert seen[0][0] > 1
        assert seen[0][1] == 0
    else:
        assert ours.step(*[lambda: 1.0] * with_closure) == (1.0 if with_closure else None)
    assert vars(ours).keys() == vars(fresh).keys()
    assert ours.state_dict().keys() == fresh.state_dict().keys()
    assert ours.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]
    handle.remove()
    handle.remove()
    assert not ours._optimizer_step_pre_hooks
    assert not ours._optimizer_step_post_hooks


def test_removed_it_no_longer_clips() -> None:
    ours, theirs = pair(SGD)
    clip_on_step(ours, 0.1).remove()
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_state_dict_scheduler_and_zero_grad() -> None:
    ours, theirs = pair(AdamW, fused=True)
    clip_on_step(ours, 0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (ours, theirs)]
    for step in range(4):
        give_gradients(ours, theirs, seed=step)
        nn.utils.clip_grad_norm_(held(theirs), 0.1)
        ours.step()
        theirs.step()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            scheduler.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
        assert held(ours)[0].grad is None
    assert_same(ours, theirs)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copied_handle_knows_the_last_step_and_is_of_no_optimizer(copied: Callable[[Any], Any]) -> None:
    ours, _ = pair(AdamW, fused=True)
    ours.param_groups[1]["max_norm"] = torch.tensor(0.2)
    handle = clip_on_step(ours, torch.tensor(0.1))
    assert copied(handle).total_norm is None
    give_gradients(ours)
    ours.step()
    known = copied(handle)
    assert isinstance(known, ClipOnStep)
    torch.testing.assert_close(
        [known.total_norm, known.clip_coef, known.group_norms[1]],
        [handle.total_norm, handle.clip_coef, handle.group_norms[1]],
        rtol=0,
        atol=0,
    )
    known.remove()
    assert len(ours._optimizer_step_pre_hooks) == 1
    give_gradients(ours, seed=1)
    ours.step()
    assert handle.total_norm != known.total_norm


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_optimizer_has_no_hook(copied: Callable[[Any], Any]) -> None:
    ours, theirs = pair(AdamW, fused=True)
    clip_on_step(ours, 0.1)
    loose = copied(ours)
    assert not loose._optimizer_step_pre_hooks
    give_gradients(loose, theirs)
    loose.step()
    theirs.step()
    assert_same(loose, theirs)


def test_a_hook_that_is_copied_all_the_same_does_nothing() -> None:
    class CopiesEverything(SGD):
        def __getstate__(self) -> dict[str, Any]:
            return dict(vars(self))

    ours, theirs = pair(CopiesEverything)
    clip_on_step(ours, 0.1)
    loose = copy.deepcopy(ours)
    assert len(loose._optimizer_step_pre_hooks) == 1
    give_gradients(loose, theirs, seed=1)
    loose.step()
    theirs.step()
    assert_same(loose, theirs)
    clip_on_step(loose, 0.1)
    give_gradients(loose, theirs, seed=2)
    nn.utils.clip_grad_norm_(held(theirs), 0.1)
    loose.step()
    theirs.step()
    assert_same(loose, theirs)


@pytest.mark.parametrize("asked", [{}, {"defer": True, "on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("removed", [False, True])
def test_nothing_waits_for_the_garbage_collector(asked: dict[str, Any], removed: bool) -> None:
    def run() -> list[weakref.ref[Any]]:
        ours, _ = pair(AdamW, fused=True)
        handle = clip_on_step(ours, 0.1, **asked)
        give_gradients(ours)
        ours.step()
        ours.step(lambda: 1.0)
        if removed:
            handle.remove()
        return [weakref.ref(ours), weakref.ref(handle), weakref.ref(handle.total_norm)]

    run()  # what is made once
    while gc.collect():  # what other tests left: some of it is garbage only when the rest is gone
        pass
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None, None, None]
        assert gc.collect() == 0
    finally:
        gc.enable()
