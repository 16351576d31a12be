"""What the options of adaptive rules may be, and in which words they are refused."""

import math
from typing import SupportsFloat

from torch import Tensor

from ..arguments import shown


def number(
    value: SupportsFloat, name: str, least: float = 0.0, most: float = math.inf, *, above: bool = False
) -> float:
    """As a float within [least, most], or above `least`."""
    if isinstance(value, bool | str | Tensor) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    number = float(value)
    if not (number > least if above else number >= least) or not number <= most:
        end = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} is {number:g}; it must be {'above' if above else 'at least'} {least:g}{end}")
    return number


def count(value: int, name: str, least: int = 1) -> int:
    """A whole number that is at least so much."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    return value


def fraction(value: SupportsFloat, name: str) -> float:
    """A weight of a moving average: within [0, 1]."""
    return number(value, name, 0.0, 1.0)
