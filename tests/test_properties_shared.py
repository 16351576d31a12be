"""Lists whose gradients share memory, drawn at random, and calls that are interrupted: what counts, what is written,
and that nothing is left half done."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fusedclip
from fusedclip import backends

from . import oracle
from .conftest import EXAMPLES, Engine, parameters
from .test_properties import UNCHECKED, Drawn, elements, gradients

COUNT = 600


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(first element, count, step) of views into one buffer; some the same, some overlapping, some strided."""
    views = []
    for _ in range(draw(st.integers(1, 6))):
        if views and draw(st.booleans()):
            views.append(draw(st.sampled_from(views)))
            continue
        first, step = draw(st.integers(0, COUNT - 1)), draw(st.sampled_from([1, 1, 1, 2, 3]))
        views.append((first, draw(st.integers(0, (COUNT - first + step - 1) // step)), step))
    return views


@settings(suppress_health_check=UNCHECKED, max_examples=min(500, EXAMPLES))
@example(views=[(0, 1, 1), (0, 1, 2)], drawn=[], dtype=torch.float32, p=2.0, flat=False)  # the same element
@given(
    views=stretches(),
    drawn=st.lists(gradients(), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    p=st.sampled_from([2.0, 1.0, float("inf"), 3.0]),
    flat=st.booleans(),
)
def test_views_of_one_buffer(
    engine: Engine,
    views: list[tuple[int, int, int]],
    drawn: list[Drawn],
    dtype: torch.dtype,
    p: float,
    flat: bool,
) -> None:
    buffer = engine.randn(COUNT, dtype=dtype)
    pieces = [buffer.as_strided((count,), (step,), first) for first, count, step in views]
    shaped = [piece if flat else piece.unsqueeze(0) for piece in pieces]  # another object, another shape
    others = [g.on(engine.device) for g in drawn]
    before = buffer.clone()
    expected = oracle.norm([*pieces, *others], p)
    if not np.isfinite(expected) or expected == 0:
        return
    norm = fusedclip.clip_grad_norm_(parameters([*shaped, *others]), 0.1 * min(expected, 1e6), p)
    oracle.assert_close(norm, expected if norm.dtype == torch.float64 else float(np.float32(expected)), 3e-6)

    # Dense stretches are written once each, and what overlaps in part as often as it is part of one. Strided gradients
    # are read before anything is written, and what is written to them comes home last.
    coef = oracle.coefficient(expected, 0.1 * min(expected, 1e6))
    times = np.zeros(COUNT, dtype=int)
    for first, count in {(first, count) for first, count, step in views if step == 1 or count <= 1}:
        times[first : first + count] += 1
    for first, count, step in views:
        if step > 1 and count > 1:
            times[first : first + count * step : step] = 1
    want = before.cpu().double().numpy() * coef**times
    np.testing.assert_allclose(buffer.cpu().double().numpy(), want, rtol=2e-5, atol=1e-37)  # subnormals are rounded


@settings(suppress_health_check=UNCHECKED, max_examples=min(200, EXAMPLES))
@given(drawn=st.lists(gradients(), min_size=1, max_size=4), at=st.integers(0, 3), how=st.integers(0, 2))
def test_an_interrupt_leaves_nothing_half_done(engine: Engine, drawn: list[Drawn], at: int, how: int) -> None:
    """One arrives while some pass writes: then all is written, or nothing."""
    calls: list[Any] = [
        lambda ps: fusedclip.clip_grad_norm_(ps, 1e-3),
        lambda ps: fusedclip.clip_grads_with_norm_(ps, 0.5, 2.0),
        lambda ps: fusedclip.clip_grad_norm_per_tensor_(ps, 1e-3),
    ]
    grads, whole = ([g.on(engine.device) for g in drawn] for _ in range(2))  # aligned alike: the same bits are due
    before = [elements(g) for g in grads]
    cls = type(next(backend for backend in backends.ORDER if backend.name == engine.name))
    passed = 0

    def interrupted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            result = original(*args, **kwargs)
            passed += 1
            if passed == at + 1:
                raise KeyboardInterrupt
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("scale_", "clip_", "clip_list_", "scale_list_", "lift"):
            patch.setattr(cls, name, interrupted(getattr(cls, name)))
        with contextlib.suppress(KeyboardInterrupt):
            calls[how](parameters(grads))
    calls[how](parameters(whole))
    same = [
        torch.equal(elements(a).nan_to_num(7), elements(b).nan_to_num(7)) for a, b in zip(grads, whole, strict=True)
    ]
    untouched = [torch.equal(elements(a).nan_to_num(7), b.nan_to_num(7)) for a, b in zip(grads, before, strict=True)]
    assert all(same) or all(untouched)
