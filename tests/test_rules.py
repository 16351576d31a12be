"""Any function of the norm may say what gradients are multiplied by; a limit is the one that engines fuse."""

import pytest
import torch
from torch import Tensor

from fusedclip import passes
from fusedclip.gradients import gather
from fusedclip.norms import ClipRule
from fusedclip.scopes import Scope, measure_scopes, scale_scopes_

from . import oracle
from .conftest import Engine, copies, parameters


class Normalised:
    """Every norm becomes `target`: an adaptive rule in small, with a state of its own."""

    zero_nonfinite = False

    def __init__(self, target: float) -> None:
        self.target, self.seen = target, list[Tensor]()

    def __call__(self, norm: Tensor) -> Tensor:
        self.seen.append(norm)
        return self.target / norm


@pytest.mark.parametrize("p", [2.0, 1.0, 0.0])
def test_a_rule_gets_the_exact_norm_and_its_coefficient_is_applied(engine: Engine, p: float) -> None:
    grads = [
        engine.randn(70_001),
        engine.randn(90, seed=1)[::2],
        torch.complex(engine.randn(5), engine.randn(5, seed=2)),
    ]
    before, expected, rule = copies(grads), oracle.norm(grads, p), Normalised(2.0)
    clipped = passes.clip_(gather(parameters(grads), p=p), p, rule)
    oracle.assert_close(clipped.norm, expected, 3e-6)
    (seen,) = rule.seen
    assert seen.dtype == torch.float64
    assert seen.device.type == engine.device
    for after, b in zip(grads, before, strict=True):
        torch.testing.assert_close(after, b * (2.0 / expected), rtol=1e-5, atol=0)


def test_scopes_have_rules_of_different_kinds(engine: Engine) -> None:
    grads = [engine.tensor([3.0, 4.0]), engine.tensor([6.0, 8.0])]
    gathered = gather(parameters(grads))
    scopes = [Scope([0], Normalised(10.0)), Scope([1], ClipRule(1.0))]
    clipped = measure_scopes(gathered, 2.0, scopes)
    scale_scopes_(gathered, scopes, [one.coef for one in clipped])
    torch.testing.assert_close(grads, [engine.tensor([6.0, 8.0]), engine.tensor([0.6, 0.8])], rtol=1e-5, atol=0)
