"""The array-API namespace of a formula's arrays: numpy, torch, or the one that symbolic values bring along.

Formulas use operators first. Functions without an operator (`solve`, `qr`, `fft`, `exp`, `concat`, ...) come from here,
named as in https://data-apis.org/array-api/latest/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

T = TypeVar("T")


def namespace(*arrays: Any) -> Any:
    """Return the namespace of all given arrays.

    Raises:
        TypeError: the arrays belong to several libraries, or to none.
    """
    present = [array for array in arrays if array is not None]
    if present and all(type(array).__module__.partition(".")[0] == "torch" for array in present):
        # A shortcut: torch.compile cannot trace the cache in which array_namespace looks this up.
        from array_api_compat import torch

        return torch
    from array_api_compat import array_namespace

    return array_namespace(*present)


def summed(arrays: Iterable[T]) -> T:
    """Return the sum of at least one array; `sum` is typed as if it could return the 0 that it starts with."""
    return cast(T, sum(cast("Iterable[Any]", arrays)))


def lengths(squares: Any) -> Any:
    """Return the square roots of sums of squares, and NaN where a sum is infinite.

    A formula that divides by an infinite norm writes zeros, which no check of the result finds: a DoRA with a scaling
    of 5e299 did.
    """
    roots = squares**0.5
    return roots + (roots - roots)


def constant(array: Any) -> Any:
    """Return the array as a constant of training: same numbers, no gradient."""
    detach = getattr(array, "detach", None)
    return array if detach is None else detach()
