"""What more ranks cost, on paper: the alpha-beta model of an all-reduce.

An all-reduce of n bytes over P ranks by recursive doubling or a tree takes about 2 log2(P) steps of latency alpha, and
moves 2 n bytes at beta seconds each:  T(P) = 2 ceil(log2 P) alpha + 2 n beta.  With the 24 bytes of one norm the second
term is nothing, and a ring, 2 (P - 1) alpha, would be used for long vectors only. Everything else that a call does
depends on this rank's shards and on the number of parameters, which weak scaling keeps as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA_US = 10.0  # a step between nodes, NCCL over InfiniBand; within a node less
BETA_US = 1e-4  # per byte: 10 GB/s, which is slow
BYTES = 24  # a norm and the two numbers that tell whether all ranks ask for the same
RANKS = (8, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Host:
    """Microseconds that a call takes beside its collectives: fixed, and per parameter."""

    name: str
    fixed: float
    each: float
    collectives: int

    def total(self, parameters: int, ranks: int) -> float:
        return self.fixed + self.each * parameters + self.collectives * all_reduce(ranks)


def all_reduce(ranks: int) -> float:
    return 2 * math.ceil(math.log2(max(ranks, 1))) * ALPHA_US + 2 * BYTES * BETA_US


def fitted(name: str, few: tuple[int, float], many: tuple[int, float], floor: float, collectives: int) -> Host:
    """The line through two measurements (parameters, microseconds), without their all-reduces of `floor` each."""
    (n, t), (m, u) = few, many
    each = max(0.0, (u - t) / (m - n))
    return Host(name, max(0.0, t - collectives * floor - each * n), each, collectives)
