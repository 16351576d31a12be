"""`python -m tests.fuzz --minutes N [--seed S]`: the property tests with other examples, round after round.

Every engine of this machine (FUSEDCLIP_ENGINES narrows them, TRITON_INTERPRET=1 adds Triton's) is held to the oracle
on lists that the seed and the number of the round determine. What fails is shrunk and shown, and ends the run with
status 1; `--seed S --round R` has it again.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

os.environ["FUSEDCLIP_EXAMPLES"] = "100"  # of each test in a round; conftest.py reads it
os.environ.pop("CI", None)  # which has every run draw the same

import hypothesis

from fusedclip import backends

from . import test_properties, test_properties_shared
from .conftest import Engine, found

TESTS: tuple[Callable[..., None], ...] = (
    test_properties.test_clip_grad_norm,
    test_properties.test_clip_grad_value,
    test_properties.test_per_tensor_norms,
    test_properties_shared.test_views_of_one_buffer,
    test_properties_shared.test_an_interrupt_leaves_nothing_half_done,
)


def counted(test: Any, lists: Counter[str], engine: Engine) -> None:
    """Have each example of a test counted."""
    inner = test.hypothesis.inner_test

    def counting(*args: Any, **kwargs: Any) -> None:
        lists[kwargs["engine"].name] += 1
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counting
    try:
        with backends.use(engine.name):
            test(engine=engine)
    finally:
        test.hypothesis.inner_test = inner


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, default=0, help="the first one")
    asked = parser.parse_args()
    lists: Counter[str] = Counter()
    start = time.monotonic()
    for number in count(asked.round):
        for engine in found():
            for test in TESTS:
                if time.monotonic() - start >= 60 * asked.minutes:
                    told = ", ".join(f"{lists[name]:,} lists on {name}" for name in lists)
                    print(f"fuzz: seed {asked.seed}, rounds {asked.round} to {number}: {told}; nothing found")
                    return 0
                try:
                    counted(hypothesis.seed(f"{asked.seed} {number}")(test), lists, engine)
                except BaseException:
                    print(f"fuzz: {engine.name}, {test.__name__}: --seed {asked.seed} --round {number}", flush=True)
                    raise
    raise AssertionError("rounds do not end by themselves")


if __name__ == "__main__":
    sys.exit(main())
