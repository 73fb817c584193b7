"""Tensors that are computed when they are read: scaled, summed or joined, in float64 with one rounding.

Joining tensors of the same dtype keeps all bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Malformed
from .lazy import DTYPES, Buffer, DType, Lazy, as_lazy, check_finite

if TYPE_CHECKING:
    import numpy as np

    from .lazy import Array as Array
    from .lazy import Leaf, Shape


def load(leaf: Leaf) -> Array:
    """Read a tensor as a numpy array: floating-point numbers in float64, integers unchanged.

    Raises:
        Malformed: the tensor contains a NaN or an infinity.
    """
    tensor = as_lazy(leaf)
    values = _checked(tensor)
    return values.view(tensor.dtype.array).astype("<f8") if tensor.dtype.floating else values


def computed(shape: Sequence[int], dtype: DType, make: Callable[[], Array]) -> Lazy:
    """Return a lazy tensor that calls `make` for its numbers at each read."""

    def fetch() -> Buffer:
        return _bytes_of(rounded(make(), dtype))

    return Lazy(tuple(shape), dtype, fetch)


def held(values: Array, dtype: DType) -> Lazy:
    """Return a lazy tensor with the given numbers, rounded once to `dtype`."""
    kept = rounded(values, dtype)
    return Lazy(tuple(kept.shape), dtype, kept.tobytes)


def rounded(values: Array, dtype: DType) -> Array:
    """Round numbers to `dtype`, in C order.

    Raises:
        Malformed: a number is not finite or overflows the dtype.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.ascontiguousarray(values, dtype=dtype.array)
    if dtype.floating and not np.isfinite(kept).all():
        raise Malformed(f"a result is out of the range of {dtype}", cure="Choose smaller weights, or a wider dtype")
    return kept


def times(leaf: Leaf, factor: float) -> Leaf:
    """Multiply a tensor by a number. The result has the tensor's dtype if the product stays exact, else float32."""
    if factor == 1:
        return leaf
    return computed(leaf.shape, _exact_type(as_lazy(leaf).dtype, factor), lambda: load(leaf) * factor)


def total(leaves: Sequence[Leaf], factors: Sequence[float], shape: Shape | None = None) -> Leaf:
    """Return sum_i factors[i] * leaves[i] in float32 or float64; the default shape is the shape of the first tensor."""
    if len(leaves) == 1 and shape is None:
        return times(leaves[0], factors[0])
    shape = tuple(leaves[0].shape) if shape is None else shape

    def make() -> Array:
        terms = (load(leaf).reshape(shape) * factor for leaf, factor in zip(leaves, factors, strict=True))
        result: Array = sum(terms)  # type: ignore[assignment]
        return result

    return computed(shape, wide(leaves), make)


def joined(leaves: Sequence[Leaf], axis: int, factors: Sequence[float] | None = None) -> Leaf:
    """Concatenate tensors along a non-negative axis; with `factors`, first multiply each tensor by its factor."""
    several = list(leaves) if factors is None else [times(*each) for each in zip(leaves, factors, strict=True)]
    if len(several) == 1:
        return several[0]
    parts = [as_lazy(leaf) for leaf in several]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    kinds = {part.dtype for part in parts}
    if len(kinds) > 1:
        return computed(shape, wide(parts), lambda: _concatenated(parts, load, shape, "<f8", axis))
    kind = kinds.pop()
    return Lazy(tuple(shape), kind, lambda: _bytes_of(_concatenated(parts, _checked, shape, kind.numpy, axis)))


def wide(leaves: Sequence[Leaf]) -> DType:
    """Return the dtype of a computed result: float64 if one of the tensors is float64, else float32."""
    return DTYPES["F64" if any(as_lazy(leaf).dtype.name == "F64" for leaf in leaves) else "F32"]


def _exact_type(dtype: DType, factor: float) -> DType:
    """Return the tensor's dtype if this dtype can hold the product exactly, else float32.

    A change of sign is always exact. Multiplying by a power of two is exact in BF16, which has float32's exponent
    range. In F16 the result may be inexact, because the exponent range is narrow.
    """
    power = abs(math.frexp(factor)[0]) == 0.5
    same = dtype.name in ("F32", "F64") or factor == -1 or (power and dtype.name == "BF16")
    return dtype if same else DTYPES["F32"]


def _concatenated(
    parts: Sequence[Lazy],
    read: Callable[[Lazy], Array],
    shape: Sequence[int],
    dtype: np.dtype[np.generic] | str,
    axis: int,
) -> Array:
    """Concatenate parts; copy each part right after it is read, while it is still in the CPU cache."""
    import numpy as np

    # Allocate the result once: np.concatenate would need a second copy of all parts.
    made, end = np.empty(shape, dtype), 0
    for part in parts:
        start, end = end, end + part.shape[axis]
        made[(slice(None),) * axis + (slice(start, end),)] = read(part)
    return made


def _bytes_of(array: Array) -> memoryview:
    """Return an array's memory as bytes, without a copy."""
    flat: Any = array.reshape(-1).view("u1")
    return memoryview(flat)


def _checked(leaf: Lazy) -> Array:
    """Read the numbers in the dtype in which they are stored, and check that all numbers are finite."""
    values = leaf.numpy()
    check_finite(leaf, values=values)
    return values
