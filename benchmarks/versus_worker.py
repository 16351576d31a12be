"""One side of `benchmarks versus`: run by its path in an environment, whose fusedclip it times.

Requests and replies are lines of JSON: first the settings, then `{"prepare": case}` and `{"turn": number}` until the
input ends.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fusedclip  # the environment's: the checkout is not on the path yet, and Python runs this with -I

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import odd
from benchmarks.contenders import engines_for, fusedclip_contender
from benchmarks.measure import Settings, entry, gradients_like, judge
from benchmarks.oracle import Oracle
from benchmarks.suites import Case, Operation
from benchmarks.timing import Budget, Entry, flusher, nothing, take_turns

# The first call of a turn finds the caches of another process and is not counted.
TURN = Budget(seconds=0.05, least=2, most=6)


class Side:
    """The row that is being timed, and the gradients that the next one may share with it."""

    def __init__(self, device: str, threads: int | None, memory: int, seed: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.contender = fusedclip_contender(engines_for(self.device)[0])
        self.settings = Settings(self.device, (self.contender,), memory, seed)
        self.right: Oracle | None = None
        self.right_for = ("", "")
        self.entries: list[Entry] = []
        self.flush: Callable[[], object] = nothing

    def prepare(self, case: Case) -> str:
        """Make the gradients as a suite's run does, let the oracle judge one call; what failed, or nothing."""
        try:
            return self._prepare_odd(case) if case.workload in odd.ODD else self._prepare(case)
        except Exception as problem:  # belongs into the row, as in a suite's run
            return f"{type(problem).__name__}: {problem}"

    def _prepare(self, case: Case) -> str:
        if self.right_for != (case.workload, case.dtype):
            self.right = None  # frees it before the next is made
            self.right = Oracle(gradients_like(case.workload, case.dtype, self.settings))
            self.right_for = case.workload, case.dtype
        assert self.right is not None
        self.entries = [replace(entry(self.contender, case.operation, self.right), name="call")]
        self.flush = flusher(self.device, self.right.gradients.nbytes)
        return judge(self.contender, case.operation, self.right).failure

    def _prepare_odd(self, case: Case) -> str:
        self.entries, self.flush = odd.entries(case, self.device, self.settings.seed), nothing
        for one in self.entries:
            one.before()
            one.call()
        return ""

    def turn(self, number: int) -> dict[str, float]:
        """Microseconds of each entry: the median of a handful of calls."""
        samples = take_turns(self.entries, self.device, TURN, number, self.flush)
        return {name: statistics.median(one.wall for one in calls[1:]) / 1e3 for name, calls in samples.items()}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed goes to where errors go
    side = Side(**json.loads(sys.stdin.readline()))
    package = {"file": fusedclip.__file__, "version": fusedclip.__version__, "torch": torch.__version__}
    print(json.dumps(package | {"engine": side.contender.name}), file=replies)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "prepare" in request:
            workload, dtype, operation = request["prepare"]
            reply: object = side.prepare(Case(workload, dtype, Operation(operation)))
            gc.collect()
            gc.freeze()  # every turn begins with a collection, which has little to look at then
        else:
            reply = side.turn(request["turn"])
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
