"""What a user gives: numbers (a boolean is none, though Python counts it among them), and the names of noise."""

import math
from numbers import Real
from typing import Any

NOISES = ("filter", "layer", "isotropic", "element")  # what shares a standard deviation; any other name is a format


def is_number(value: Any) -> bool:
    """Whether ``value`` is one finite real number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is one whole number, also as a float (``1e4``)."""
    return is_number(value) and float(value).is_integer()


def demand_whole(name: str, value: Any, least: int, why: str = "") -> None:
    """ValueError unless ``value`` is an integer, not a float, of at least ``least``; ``why``: said after that."""
    if not (is_whole(value) and not isinstance(value, float) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}{why}, got {value!r}")


def demand_positive(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a finite number above 0."""
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
