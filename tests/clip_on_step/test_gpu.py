"""Steps on a GPU that wait for it, or that a graph replays with what was known while it was recorded."""

from typing import Any

import pytest
import torch
from torch.optim import AdamW

from fusedclip.optim import clip_on_step

from .. import oracle
from ..conftest import Engine, engines, parameters
from ..device_waits import no_waits

pytestmark = engines("cuda", "triton", on="cuda")


@pytest.mark.parametrize("defer", [None, False, True])
@pytest.mark.parametrize("skip", ["propagate", "skip"])
def test_no_synchronisation_on_a_gpu(engine: Engine, defer: bool | None, skip: Any) -> None:
    optimizer = AdamW(parameters([engine.randn(n) for n in (10, 70001)]), fused=True)
    clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite=skip)
    optimizer.step()
    with no_waits():
        optimizer.step()


@pytest.mark.parametrize("defer", [False, True])
def test_a_captured_step_clips_at_every_replay(engine: Engine, defer: bool) -> None:
    grads = [engine.randn(n) for n in (10, 70001)]
    optimizer = AdamW(parameters(grads), lr=0.1, fused=True, capturable=True)
    handle = clip_on_step(optimizer, 1.0, defer=defer, on_nonfinite="skip")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for size in (2.0, 0.001):
        for grad in grads:
            grad.fill_(size)
        graph.replay()
        oracle.assert_close(handle.total_norm, oracle.norm([torch.full_like(g, size) for g in grads]), 3e-6)
