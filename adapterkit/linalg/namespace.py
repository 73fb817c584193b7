"""The array-API namespace of a formula's arrays: numpy, torch, or the namespace that symbolic values provide.

Formulas use operators first. Functions without an operator (`solve`, `qr`, `fft`, `exp`, `concat`, ...) come from this
namespace, with the names in https://data-apis.org/array-api/latest/.
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
        # Take a shortcut for torch: torch.compile cannot trace the cache of array_namespace.
        from array_api_compat import torch

        return torch
    from array_api_compat import array_namespace

    return array_namespace(*present)


def summed(arrays: Iterable[T]) -> T:
    """Return the sum of one or more arrays, typed as their type; `sum` would be typed as possibly 0."""
    return cast(T, sum(cast("Iterable[Any]", arrays)))


def lengths(squares: Any) -> Any:
    """Return the square roots of sums of squares; an infinite sum gives NaN.

    Dividing by an infinite norm would give zeros, which no check of the result detects. This happened with a DoRA whose
    scaling was 5e299.
    """
    roots = squares**0.5
    return roots + (roots - roots)


def constant(array: Any) -> Any:
    """Return the array as a constant for training: same numbers, no gradient."""
    detach = getattr(array, "detach", None)
    return array if detach is None else detach()
