"""CONTRIBUTING's rule works as it stands there."""

import re
from pathlib import Path

import torch

from fusedclip.adaptive import options
from fusedclip.norms import ClipRule
from fusedclip.rules import AdaptiveRule, Proposal

from ..conftest import Engine, parameters

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_example_of_contributing(engine: Engine) -> None:
    text = CONTRIBUTING.read_text().partition("## An adaptive rule")[2]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"AdaptiveRule": AdaptiveRule, "Proposal": Proposal, "ClipRule": ClipRule, "torch": torch}
    exec(code, names | {"number": options.number}, names)
    rule = names["Halving"]()  # type: ignore[operator]
    for size, expected in ((8.0, 4.0), (float("nan"), 4.0), (2.0, 4.0), (16.0, 8.0)):
        rule.clip_(parameters([engine.tensor([size])]))
        assert float(rule.threshold) == expected
