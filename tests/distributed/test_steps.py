"""Steps of optimizers over sharded parameters: a scaler that skips on all ranks or on none, and clips on step."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from fusedclip.amp import unscale_and_clip_grad_norm_
from fusedclip.optim import clip_on_step

from .. import oracle
from ..conftest import parameters as plain_parameters
from ..ranks import in_one_worker, on_two_ranks
from .shards import Case, all_reduces, copies, local, random, same_bits_on_all_ranks

pytestmark = in_one_worker


def amp_skips_the_same_steps(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    case = Case(random(6, 5), mesh, [Shard(0)])
    for p in (2.0, 3.0, math.inf):
        for bad in (False, True):
            params = [case.parameter(), *plain_parameters([torch.ones(3)])]
            optimizer = torch.optim.SGD(params, lr=0.5)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            if bad and rank == 1:
                local(params[0].grad)[0, 0] = math.inf
            with all_reduces() as made:
                norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.1, p)
            assert made == (["max"] if p == math.inf else ["sum", "max"] if p == 3 else ["sum"])
            same_bits_on_all_ranks(norm)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (2.0 if bad else 4.0)
            stepped = bool((local(params[0]) != 0).any())
            assert stepped != bad
            if not bad:
                oracle.assert_close(norm, oracle.norm([case.full, torch.ones(3)], p) / 4, 3e-6)


def steps_that_clip(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    cases = [Case(random(6, 5), mesh, [Shard(0)]), Case(random(7, seed=1), mesh, [Shard(0)])]
    expected = oracle.norm([case.full for case in cases])
    for make in (
        lambda params: torch.optim.SGD(params, lr=1.0),
        lambda params: torch.optim.SGD(params, lr=1.0, foreach=False),
    ):
        params = [case.parameter() for case in cases]
        before = copies(params)
        optimizer = make(params)
        handle = clip_on_step(optimizer, 1.0)
        optimizer.step()
        assert handle.total_norm is not None
        oracle.assert_close(handle.total_norm, expected, 3e-6)
        for parameter, gradient in zip(params, before, strict=True):
            oracle.assert_scaled(-local(parameter), gradient, oracle.coefficient(expected, 1.0), 2)
    for options in ({}, {"defer": True}, {"on_nonfinite": "skip"}):
        params, plain = [case.parameter() for case in cases], plain_parameters([case.full.clone() for case in cases])
        for several in (params, plain):
            for parameter in several:
                torch.nn.init.zeros_(parameter)
            optimizer = torch.optim.AdamW(several, lr=1.0, fused=True)
            clip_on_step(optimizer, 1.0, **options)
            optimizer.step()
        for parameter, whole in zip(params, plain, strict=True):
            torch.testing.assert_close(parameter.full_tensor(), whole.detach())
    params = [case.parameter() for case in cases]
    optimizer = torch.optim.SGD([{"params": params[:1], "max_norm": 0.5}, {"params": params[1:]}], lr=1.0)
    handle = clip_on_step(optimizer, 1.0)
    with all_reduces() as made:
        optimizer.step()
    assert made == ["sum"]
    oracle.assert_close(handle.group_norms[0], oracle.norm([cases[0].full]), 3e-6)


@pytest.mark.parametrize("scenario", [amp_skips_the_same_steps, steps_that_clip])
def test_two_ranks(scenario: Callable[[int], None]) -> None:
    on_two_ranks(scenario)
