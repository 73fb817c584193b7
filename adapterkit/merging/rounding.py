"""Stochastic rounding: up or down with the probability that makes the expected value the exact one.

Croci et al. 2022, https://doi.org/10.1098/rsos.211631. The draw of an element is a function of the seed, the tensor's
name and the element's number, so it does not depend on blocks, threads, devices or which run wrote it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ..linalg.namespace import namespace
from ..linalg.philox import WORD, philox

if TYPE_CHECKING:
    from ..io.lazy import DType

Key = tuple[int, int]


def key_of(seed: int, name: str) -> Key:
    """The Philox key of a tensor: the first two little-endian words of the sha256 of `seed:name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def stochastic(values: Any, first: int, key: Key, dtype: DType) -> Any:
    """float64 values that `dtype` holds exactly, each one of the two nearest below and above; flat.

    Args:
        values: flat float64 array; what is exact in the dtype, or not finite, stays as it is.
        first: the number of the first element in its tensor.
        key: of the tensor.
        dtype: narrower than float64.
    """
    xp, unit = namespace(values), _unit(values, dtype)
    rounded = xp.floor(values / unit + draws(values, first, key)) * unit
    return xp.where(xp.isfinite(values), rounded, values)


def draws(like: Any, first: int, key: Key) -> Any:
    """A number in [0, 1) for each element: word i mod 4 of Philox for the counter i div 4, over 2^32."""
    from array_api_compat import device

    xp, start = namespace(like), first // 4
    places = xp.arange(start, (first + len(like) + 3) // 4, dtype=xp.int64, device=device(like))
    none = places * 0
    words = philox((places & WORD, places >> 32, none, none), key)
    flat = xp.reshape(xp.stack(list(words), axis=-1), (-1,))
    return xp.astype(flat[first - 4 * start : first - 4 * start + len(like)], xp.float64) * 2.0**-32


def _unit(values: Any, dtype: DType) -> Any:
    """The distance of two neighbours in `dtype` where each value lies: exact powers of two."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype.array)  # type: ignore[no-untyped-call]
    xp = namespace(values)
    mantissa = _frexp(values)
    smallest = xp.zeros_like(values) + 2.0 ** int(info.minexp)
    safe = xp.where((mantissa == 0) | ~xp.isfinite(values), smallest * 0 + 1, mantissa)
    power = xp.where((mantissa == 0) | ~xp.isfinite(values), smallest, values / safe * 0.5)
    return xp.where(power < smallest, smallest, power) * 2.0 ** -int(info.nmant)


def _frexp(values: Any) -> Any:
    """The mantissas, in [0.5, 1) or negative; frexp is not of the array standard, but of numpy and torch."""
    if hasattr(values, "frexp"):
        return values.frexp()[0]
    import numpy as np

    return np.frexp(values)[0]
