"""Every engine's update against the specification, to the bit: dtypes, masters, lengths, threads, instruction sets."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fusedclip import _extension
from fusedclip.backends import ORDER, Streams
from fusedclip.backends.reference_update import ReferenceUpdater
from fusedclip.dtypes import LIST
from fusedclip.updates import AdamWRule, SGDRule, UpdateRule, join, round_away, split

from ..conftest import ALL, EXAMPLES

RULES: list[UpdateRule] = [
    AdamWRule(1e-3, 0.9, 0.999, 1e-8, 0.01),
    AdamWRule(torch.tensor(1e-3, dtype=torch.float64), 0.3, 0.99, 1e-6, 0.0, amsgrad=True, maximize=True),
    SGDRule(1e-2, 0.9, 0.1, 0.01),
    SGDRule(1e-2, 0.9, 0.0, 0.0, nesterov=True),
    SGDRule(1e-2, 0.0, 0.0, 0.0, maximize=True),
]
COEFS = [1.0, 0.37, 1e-70, 1e30, 0.0, float("nan")]
ENGINES = pytest.mark.parametrize(
    "name",
    [
        pytest.param(b.name, id=f"{b.name}-cpu")
        for b in ORDER
        if b.updater and b.missing() is None and b.refuses(torch.device("cpu"), frozenset(LIST)) is None
        if b.name != "reference"
    ],
)
LENGTHS = [0, 1, 7, 33, 1025, 70001]


def streams(rule: UpdateRule, dtypes: list[torch.dtype], count: int, master: str | None, seed: int) -> Streams:
    """One parameter: its dtype, its gradient's, its states'."""
    generator = torch.Generator().manual_seed(seed)

    def randn(dtype: torch.dtype, spread: float) -> Tensor:
        exponents = torch.rand(count, generator=generator, dtype=torch.float64) * spread - spread / 2
        return (torch.randn(count, generator=generator, dtype=torch.float64) * 10**exponents).to(dtype)

    parameter, gradient = randn(dtypes[0], 3), randn(dtypes[1], 12)
    if count > 5:
        gradient[:3] = torch.tensor([float("nan"), float("inf"), 0.0])
    kept = None
    if master is not None and dtypes[0] == torch.bfloat16:
        parameter, kept = split(randn(torch.float32, 3))
        kept = join(parameter, kept) if master == "fp32" else kept
    states = tuple([randn(dtypes[2], 6).abs()] for _ in rule.states)
    steps = [torch.tensor(float(seed % 3))] if rule.counts_steps else None
    return Streams(torch.device("cpu"), [0], [parameter], [gradient], states, [kept], steps)


def everything(s: Streams) -> list[Tensor]:
    masters = [master for master in s.masters if master is not None]
    return [*s.parameters, *s.gradients, *(t for state in s.states for t in state), *masters, *(s.steps or [])]


def assert_same_bits(ours: Streams, theirs: Streams) -> None:
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        if a.dtype == torch.float64:  # of whose square roots torch's own are off by the last place
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(ours.masters, theirs.masters, strict=True):
        if a is not None and b is not None and a.dtype == torch.float16:  # bits that may be a NaN by that name
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@ENGINES
@given(
    rule=st.sampled_from(RULES),
    dtypes=st.lists(st.sampled_from(LIST), min_size=3, max_size=3),
    count=st.sampled_from(LENGTHS),
    master=st.sampled_from([None, "fp32", "split"]),
    coef=st.sampled_from(COEFS),
    skip=st.sampled_from([None, 0.0, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_specification(
    name: str,
    rule: UpdateRule,
    dtypes: list[torch.dtype],
    count: int,
    master: str | None,
    coef: float,
    skip: float | None,
    seed: int,
) -> None:
    updater = next(b.updater for b in ORDER if b.name == name)
    assert updater is not None
    expected = streams(rule, dtypes, count, master, seed)
    coefs = torch.tensor([coef], dtype=torch.float64)
    flag = None if skip is None else torch.tensor(skip)
    before = copy.deepcopy(everything(expected))
    ReferenceUpdater().update_(expected, [rule], coefs, flag)
    if skip:
        torch.testing.assert_close(everything(expected), before, rtol=0, atol=0, equal_nan=True)
    sets = _extension.C.instruction_sets() if name == "cpu" else [None]
    try:
        for one in sets:
            if one is not None:
                _extension.C.use_instruction_set(one)
            ours = streams(rule, dtypes, count, master, seed)
            assert updater.misfits(ours) == []
            updater.update_(ours, [rule], coefs, flag)
            assert_same_bits(ours, expected)
    finally:
        if sets[0] is not None:
            _extension.C.use_instruction_set(sets[0])


def test_a_split_master_is_the_master() -> None:
    """All 2^16 remainders with every exponent and sign; what is beside zero, infinity and the largest."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    # There are 2^7 for each exponent and sign. .ci/run takes more of them; a few at once stay in the cache.
    high = torch.arange(0, 1 << 16, 37 if EXAMPLES >= ALL else 127, dtype=torch.int32)
    for some in high.split(16):
        check_split((some[:, None] << 16 | low[None]).flatten())
    edges = torch.tensor(
        [0, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FFF, 0x8000, 0x18000], dtype=torch.int32
    )
    check_split(torch.cat([edges, edges | -(2**31)]))


def check_split(bits: Tensor) -> None:
    master = bits.view(torch.float32)
    parameter, remainder = split(master)
    read = join(parameter, remainder)
    nan = master.isnan()
    assert torch.equal(read[~nan].view(torch.int32), bits[~nan])
    assert read[nan].isnan().all()
    assert parameter[nan].isnan().all()
    assert not parameter[~nan].isnan().any()
    assert torch.equal(parameter[~nan], round_away(master)[~nan])
    finite = parameter.isfinite() & ~nan
    distance = (parameter.double() - master.double()).abs()[finite]
    nearest = (master.bfloat16().double() - master.double()).abs()[finite]
    assert (distance <= nearest).all()


def test_a_zero_that_somebody_wrote_is_no_nan() -> None:
    remainder = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    for zero in (0.0, -0.0):
        read = join(torch.full(remainder.shape, zero, dtype=torch.bfloat16), remainder)
        assert (read.abs() < 1e-38).all()
