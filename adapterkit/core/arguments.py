"""Check the types of arguments that several public functions accept: weights, counts and functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import PASS_ONE_WEIGHT_EACH, UsageError, shown


def weights_of(weights: object, count: int) -> list[float]:
    """Return one finite factor for each of `count` adapters; if `weights` is None, return the factor 1 for each.

    Raises:
        UsageError: `weights` is not a list of numbers, the number of weights is not `count`, or a weight is not finite.
    """
    if weights is None:
        return [1.0] * count
    try:
        if not isinstance(weights, Iterable) or isinstance(weights, str | bytes):
            raise TypeError
        factors = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise UsageError(f"weights {shown(weights)} are not a list of numbers", cure=PASS_ONE_WEIGHT_EACH) from None
    except OverflowError:  # A Python integer can be larger than any float.
        factors = [math.inf] * count
    if len(factors) != count:
        raise UsageError(f"{len(factors)} weights for {count} adapters", cure=PASS_ONE_WEIGHT_EACH)
    if not all(math.isfinite(factor) for factor in factors):
        raise UsageError(f"weights {shown(weights)} are not all finite", cure="Pass a finite number for each adapter")
    return factors


def check_factor(factor: object, name: str) -> float:
    """Return an argument as a float.

    Raises:
        UsageError: the argument is not a finite number.
    """
    try:
        finite = math.isfinite(factor)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise UsageError(f"{name} {shown(factor)} is not a finite number", where=name, cure=f"Pass {name}= as a number")
    return float(factor)  # type: ignore[arg-type]


def check_count(value: object, name: str, flag: str) -> None:
    """Check that an argument is None or a whole number of at least 1.

    Args:
        value: the argument's value.
        name: the argument's name.
        flag: the text for the error, such as `--sample N (sample=N)`.

    Raises:
        UsageError: the argument is something else.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} {shown(value)} is not a whole number", where=name, cure=f"Pass {flag}, N >= 1")
    if value < 1:
        raise UsageError(f"{name} must be at least 1, got {value}", cure=f"Pass {flag}, N >= 1")
