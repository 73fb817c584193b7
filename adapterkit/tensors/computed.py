"""Leaves that are computed when they are read: times a number, summed, joined; float64 in the middle, one rounding.

What is only moved keeps its bits: leaves of one type that are joined are not computed with at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import Malformed
from .dtypes import DTYPES, DType
from .finite import check_finite
from .lazy import Buffer, Lazy, as_lazy

if TYPE_CHECKING:
    import numpy as np

    from .lazy import Leaf, Shape

    Array = np.ndarray[Any, Any]


def load(leaf: Leaf) -> Array:
    """A leaf as a numpy array to compute with: real numbers in float64, whole numbers as they are.

    Raises:
        Malformed: a NaN or an infinity.
    """
    tensor = as_lazy(leaf)
    values = _checked(tensor)
    return values.view(tensor.dtype.array).astype("<f8") if tensor.dtype.floating else values


def computed(shape: Sequence[int], dtype: DType, make: Callable[[], Array]) -> Lazy:
    """A leaf whose numbers `make` computes each time that they are read."""

    def fetch() -> Buffer:
        return _bytes_of(rounded(make(), dtype))

    return Lazy(tuple(shape), dtype, fetch)


def held(values: Array, dtype: DType) -> Lazy:
    """A leaf of numbers that are computed already, rounded once to `dtype`."""
    kept = rounded(values, dtype)
    return Lazy(tuple(kept.shape), dtype, kept.tobytes)


def rounded(values: Array, dtype: DType) -> Array:
    """Numbers to the nearest of `dtype`, in C order.

    Raises:
        Malformed: one of them has no place in it.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.ascontiguousarray(values, dtype=dtype.array)
    if dtype.floating and not np.isfinite(kept).all():
        raise Malformed(f"a result that {dtype} cannot hold", cure="Choose smaller weights, or a wider dtype")
    return kept


def times(leaf: Leaf, factor: float) -> Leaf:
    """A leaf times a number; in float32 at least where its own type would round the product."""
    if factor == 1:
        return leaf
    return computed(leaf.shape, _exact_type(as_lazy(leaf).dtype, factor), lambda: load(leaf) * factor)


def total(leaves: Sequence[Leaf], factors: Sequence[float], shape: Shape | None = None) -> Leaf:
    """sum_i factors[i] * leaves[i], in the shape of the first if not said; in float32 at least."""
    if len(leaves) == 1 and shape is None:
        return times(leaves[0], factors[0])
    shape = tuple(leaves[0].shape) if shape is None else shape

    def make() -> Array:
        terms = (load(leaf).reshape(shape) * factor for leaf, factor in zip(leaves, factors, strict=True))
        result: Array = sum(terms)  # type: ignore[assignment]
        return result

    return computed(shape, wide(leaves), make)


def joined(leaves: Sequence[Leaf], axis: int, factors: Sequence[float] | None = None) -> Leaf:
    """Leaves behind one another along an axis counted from the front, each times a factor, if any are given."""
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
    """The type of a computed result: float64 where one of the leaves is of it, else float32."""
    return DTYPES["F64" if any(as_lazy(leaf).dtype.name == "F64" for leaf in leaves) else "F32"]


def _exact_type(dtype: DType, factor: float) -> DType:
    """Its own for a change of sign, and for a power of two where there is room for it."""
    power = abs(math.frexp(factor)[0]) == 0.5
    same = dtype.name in ("F32", "F64") or factor == -1 or (power and dtype.name == "BF16")
    return dtype if same else DTYPES["F32"]


def _concatenated(
    parts: Sequence[Lazy], read: Callable[[Lazy], Array], shape: Sequence[int], dtype: Any, axis: int
) -> Array:
    """Parts behind one another; each goes to its place when it is read, while it is still in the cache."""
    import numpy as np

    made, end = np.empty(shape, dtype), 0
    for part in parts:
        start, end = end, end + part.shape[axis]
        made[(slice(None),) * axis + (slice(start, end),)] = read(part)
    return made


def _bytes_of(array: Array) -> memoryview:
    """An array's own bytes, not copied."""
    flat: Any = array.reshape(-1).view("u1")
    return memoryview(flat)


def _checked(leaf: Lazy) -> Array:
    """The numbers in their storage type, all of them finite."""
    values = leaf.numpy()
    check_finite(leaf, values=values)
    return values
