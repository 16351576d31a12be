"""patch_torch(): every road into torch's clipping functions leads here, and back."""

import inspect
import sys
import threading
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm  # by name, before

import fusedclip

from .conftest import parameters


def bf16() -> list[torch.Tensor]:
    return [torch.full((1000,), 0.1, dtype=torch.bfloat16) for _ in range(3)]


def is_ours(norm: torch.Tensor) -> bool:
    return norm.dtype == torch.float32  # torch rounds it to bfloat16


@pytest.mark.parametrize(
    "clip", [clip_grad_norm_, torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad.clip_grad_norm_]
)
def test_clip_grad_norm(clip: object) -> None:
    assert not is_ours(clip(parameters(bf16()), 1.0))  # type: ignore[operator]
    with fusedclip.patch_torch():
        assert is_ours(clip(parameters(bf16()), 1.0))  # type: ignore[operator]
        assert is_ours(clip(parameters=parameters(bf16()), max_norm=1.0, norm_type=2.0, foreach=True))  # type: ignore[operator]
    assert not is_ours(clip(parameters(bf16()), 1.0))  # type: ignore[operator]


def test_siblings() -> None:
    duplicate = parameters([torch.tensor([3.0, 4.0])]) * 2  # torch clips it twice
    nan = torch.tensor([float("nan")])
    with fusedclip.patch_torch():
        assert is_ours(get_total_norm(bf16()))
        assert is_ours(torch.nn.utils.get_total_norm(bf16()))
        assert is_ours(torch.nn.utils.clip_grad._get_total_norm(bf16()))
        clip_grads_with_norm_(duplicate, 1.0, torch.tensor(5.0))
        torch.testing.assert_close(duplicate[0].grad, torch.tensor([0.6, 0.8]))
        with pytest.raises(ValueError, match="clip_value"):
            clip_grad_value_(parameters([nan]), -1.0)
        with pytest.warns(FutureWarning, match="deprecated"):
            assert is_ours(torch.nn.utils.clip_grad_norm(parameters(bf16()), 1.0))
    assert not is_ours(get_total_norm(bf16()))


def test_patches_nest_and_removing_twice_is_harmless() -> None:
    first, second = fusedclip.patch_torch(), fusedclip.patch_torch()
    first.remove()
    first.remove()
    assert is_ours(get_total_norm(bf16()))
    second.remove()
    assert not is_ours(get_total_norm(bf16()))


def test_threads_that_patch_at_once() -> None:
    """They have torch patched while any of them is inside, and nothing is left of it afterwards."""
    failures: list[object] = []
    barrier = threading.Barrier(8)

    def patch_often() -> None:
        barrier.wait()
        try:
            for i in range(20_000):
                with fusedclip.patch_torch():
                    if i % 1000 == 0 and not is_ours(get_total_norm(bf16())):
                        failures.append("torch's own function inside of a patch")
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=patch_often) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert not is_ours(get_total_norm(bf16()))


def test_removed_after_an_error() -> None:
    with pytest.raises(KeyError), fusedclip.patch_torch():
        raise KeyError
    assert not is_ours(get_total_norm(bf16()))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_"])
def test_the_warning_of_an_empty_generator_is_at_the_callers_line(name: str, patched: bool) -> None:
    more = (1.0, 1.0) if name == "clip_grads_with_norm_" else (1.0,)
    function = getattr(torch.nn.utils if patched else fusedclip, name)
    patch = fusedclip.patch_torch()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function((p for p in ()), *more)
        assert [(w.filename, "empty generator" in str(w.message)) for w in caught] == [(__file__, True)]
    finally:
        patch.remove()


def test_a_torch_that_is_built_otherwise_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils.clip_grad, "clip_grad_value_", lambda *a: None)
    with pytest.raises(RuntimeError, match="clip_grad_value_ in a way that patch_torch"):
        fusedclip.patch_torch()
    assert not is_ours(get_total_norm(bf16()))


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"])
def test_signatures_are_torchs_and_then_some(name: str) -> None:
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    ours = inspect.signature(getattr(fusedclip, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for argument, theirs_is in theirs.items():
        assert ours[argument].default == theirs_is.default
        assert ours[argument].kind == theirs_is.kind
    assert all(ours[extra].kind == inspect.Parameter.KEYWORD_ONLY for extra in list(ours)[len(theirs) :])
