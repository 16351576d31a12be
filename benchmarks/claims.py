"""The project's promises about speed, error and host cost, computed from the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.operations import Operation
from benchmarks.results import Claim, Measurement, Row

# (workload, dtype, operation) -> how many times faster than torch's foreach path, on two CPU cores.
RATIOS: dict[tuple[str, str, Operation], float] = {
    ("gpt2", "float32", Operation.NOT_CLIPPED): 3.3,
    ("gpt2", "bfloat16", Operation.NOT_CLIPPED): 3.4,
    ("gpt2", "float16", Operation.NOT_CLIPPED): 8.0,
    ("gpt2", "float32", Operation.CLIPPED): 1.1,
    ("gpt2", "bfloat16", Operation.CLIPPED): 1.25,
    ("gpt2", "float16", Operation.CLIPPED): 3.0,
    ("1000x256", "float32", Operation.NOT_CLIPPED): 15.0,
    ("5000x64", "float32", Operation.CLIPPED): 12.0,
    ("300x4096", "float32", Operation.NOT_CLIPPED): 11.0,
}
# A not-clipped call that takes no longer than reading its bytes / 0.92 can't be asked to be faster.
FLOOR_FRACTION = 0.92
HOST_US, HOST_US_PER_TENSOR = 10.0, 0.12
NORM_ERROR, NORM_ERROR_FP32 = 3e-6, 1e-7


def claims(rows: list[Row]) -> list[Claim]:
    """Every claim for which the rows have a measurement."""
    on_cpu = [row for row in rows if row.device == "cpu"]
    return [*ratio_claims(on_cpu), *host_claims(on_cpu), *error_claims(on_cpu)]


def ratio_claims(rows: list[Row]) -> Iterator[Claim]:
    for row in rows:
        bar = RATIOS.get((row.workload, row.dtype, Operation(row.operation)))
        if bar is not None and row.ours is not None and row.ours.failure:
            yield Claim(ratio_name(row), 0.0, bar, "x", True, f"failed the oracle: {row.ours.failure}")
        elif bar is not None and row.ours is not None and row.ours.ratio_to_foreach is not None:
            yield ratio_claim(row, row.ours, row.ours.ratio_to_foreach, bar)


def ratio_name(row: Row) -> str:
    return f"{row.title}, {row.dtype}, {row.operation}, torch foreach / fusedclip"


def ratio_claim(row: Row, ours: Measurement, ratio: float, bar: float) -> Claim:
    """The ratio, or the fraction of the read floor where that is what lets the row count.

    Against the floor's p20, not its median: a floor that was disturbed must not excuse a slow call.
    """
    busy = f"; {row.restless}" if row.restless else ""
    fraction = (row.floor.p20_us or 0.0) / ours.p50_us if ours.p50_us else 0.0
    if ratio < bar and row.operation == Operation.NOT_CLIPPED.value and fraction >= FLOOR_FRACTION:
        note = f"{ratio:.2f}x torch foreach falls short of {bar}x; counts by the read floor{busy}"
        name = f"{row.title}, {row.dtype}, {row.operation}, time of reading / time"
        return Claim(name, fraction, FLOOR_FRACTION, "of the read floor", True, note)
    return Claim(ratio_name(row), ratio, bar, "x", True, f"{fraction:.0%} of the read floor{busy}")


def host_claims(rows: list[Row]) -> Iterator[Claim]:
    """The time beyond reading the same bytes as one tensor, where the bytes are next to none."""
    spent = [(row.tensors, us) for row in rows if row.workload.endswith("x8") and (us := host_us(row)) is not None]
    if not spent:
        return
    shares = {tensors: us / (HOST_US + HOST_US_PER_TENSOR * tensors) for tensors, us in spent}
    worst = max(shares, key=lambda tensors: shares[tensors])
    note = ", ".join(f"{tensors:,}: {us:.1f} us" for tensors, us in spent)
    name = f"host cost over ({HOST_US:g} us + {HOST_US_PER_TENSOR:g} us per tensor), worst at {worst:,} tensors"
    yield Claim(name, shares[worst], 1.0, "of what is allowed", False, note)


def host_us(row: Row) -> float | None:
    """Beyond the read floor's p20: what disturbs a sum of a few microseconds must not be subtracted."""
    if row.ours is None or row.ours.p50_us is None or row.floor.p20_us is None:
        return None
    return row.ours.p50_us - row.floor.p20_us


def error_claims(rows: list[Row]) -> Iterator[Claim]:
    errors = [(row, norm_error(row.ours)) for row in rows if row.ours and row.operation != Operation.VALUE.value]
    exact = [error for row, error in errors if is_small_fp32(row)]
    others = [error for row, error in errors if not is_small_fp32(row)]
    if exact:
        yield Claim("norm against fp64, fp32 up to 2^24 elements", max(exact), NORM_ERROR_FP32, "relative", False)
    if others:
        yield Claim("norm against fp64, everything else", max(others), NORM_ERROR, "relative", False)


def norm_error(ours: Measurement) -> float:
    """No answer, or not a number, counts as an error of 1."""
    error = ours.norm_error
    return error if error is not None and math.isfinite(error) else 1.0


def is_small_fp32(row: Row) -> bool:
    return row.dtype == "float32" and row.elements <= 1 << 24
