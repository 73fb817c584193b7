"""Lazy tensors taken apart, put together and turned: what conversions between dialects do to factors.

All but `times` and `widened` only move numbers, so that there and back gives the same bytes. Nothing is read before it
is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .dtypes import DTYPES, DType
from .lazy import Lazy, Span, as_array, bytes_of

if TYPE_CHECKING:
    import numpy as np

    Order = Callable[[], np.ndarray[Any, Any]]

REAL = ("F64", "F32", "F16", "BF16")
"""Element types that the dialects of language models have in common."""


def turned(leaf: Lazy) -> Lazy:
    """The last two axes swapped."""
    *lead, rows, columns = leaf.shape
    return leaf.map(lambda a: a.swapaxes(-1, -2), (*lead, columns, rows))


def reordered(leaf: Lazy, order: Order, axis: int = 0) -> Lazy:
    """Positions along an axis in another order: position i of the result is position `order()[i]` of the tensor."""
    return leaf.map(lambda a: a.take(order(), axis), leaf.shape)


def part(leaf: Lazy, start: int, stop: int, axis: int = 0, step: int = 1) -> Lazy:
    """Every `step`-th position from `start` to `stop` along an axis.

    Raises:
        ValueError: the tensor does not have them.
    """
    at = axis % len(leaf.shape)
    if not 0 <= start <= stop <= leaf.shape[at]:
        raise ValueError(f"no positions {start} to {stop} along axis {at} of {list(leaf.shape)}")
    if (start, stop, step) == (0, leaf.shape[at], 1):
        return leaf
    shape = (*leaf.shape[:at], len(range(start, stop, step)), *leaf.shape[at + 1 :])
    return leaf.map(lambda a: a[(slice(None),) * at + (slice(start, stop, step),)], shape)


def spread(leaf: Lazy, size: int, start: int, step: int, axis: int = 0) -> Lazy:
    """The tensor at every `step`-th position from `start` on of an axis of `size`, and zeros at the others."""
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])

    def fetch() -> memoryview:
        import numpy as np

        whole = np.zeros(shape, leaf.dtype.numpy)
        whole[(slice(None),) * axis + (slice(start, None, step),)] = leaf.numpy()
        return bytes_of(whole)

    return Lazy(shape, leaf.dtype, fetch)


def item(leaf: Lazy, index: int) -> Lazy:
    """One of what is stacked along the first axis; of a tensor in a file, no more than that one is read."""
    shape = leaf.shape[1:]
    count = math.prod(shape)
    span = None
    if leaf.span is not None:
        size = count * leaf.dtype.itemsize
        span = Span(leaf.span.path, leaf.span.offset + index * size, size)
    return Lazy(shape, leaf.dtype, lambda: leaf.read(index * count, count), span)


def joined(leaves: Sequence[Lazy], axis: int = 0) -> Lazy:
    """Tensors one after another along an axis, in the narrowest type that holds them all."""
    alike = same_type(leaves)
    shape = list(alike[0].shape)
    shape[axis] = sum(leaf.shape[axis] for leaf in alike)

    def fetch() -> memoryview:
        import numpy as np

        return bytes_of(np.concatenate([leaf.numpy() for leaf in alike], axis))

    return alike[0] if len(alike) == 1 else Lazy(tuple(shape), alike[0].dtype, fetch)


def stacked(leaves: Sequence[Lazy]) -> Lazy:
    """Tensors of one shape along a new first axis."""
    return joined([leaf.reshape(1, *leaf.shape) for leaf in leaves])


def block_diagonal(leaves: Sequence[Lazy]) -> Lazy:
    """Matrices along the diagonal of one that is zero elsewhere."""
    alike = same_type(leaves)
    shape = (sum(leaf.shape[0] for leaf in alike), sum(leaf.shape[1] for leaf in alike))

    def fetch() -> memoryview:
        import numpy as np

        whole = np.zeros(shape, alike[0].dtype.numpy)
        row = column = 0
        for leaf in alike:
            height, width = leaf.shape
            whole[row : row + height, column : column + width] = leaf.numpy()
            row, column = row + height, column + width
        return bytes_of(whole)

    return Lazy(shape, alike[0].dtype, fetch)


def padded(leaf: Lazy, size: int, axis: int) -> Lazy:
    """Zeros behind what is there along an axis, up to `size`."""
    lack = size - leaf.shape[axis]
    if not lack:
        return leaf
    shape = list(leaf.shape)
    shape[axis] = lack
    return joined([leaf, zeros(tuple(shape), leaf.dtype)], axis)


def zeros(shape: tuple[int, ...], dtype: DType) -> Lazy:
    """A tensor of zeros, which takes no memory before it is fetched."""
    return Lazy(shape, dtype, lambda: bytes(math.prod(shape) * dtype.itemsize))


def times(leaf: Lazy, factor: float) -> Lazy:
    """The tensor times a number: computed in float64, rounded once to the tensor's own type."""
    return Lazy(
        leaf.shape, leaf.dtype, lambda: bytes_of((as_array(leaf).astype("f8") * factor).astype(leaf.dtype.array))
    )


def widened(leaf: Lazy, name: str) -> Lazy:
    """The tensor in another element type; exact where that type is wider."""
    if leaf.dtype.name == name:
        return leaf
    dtype = DTYPES[name]
    return Lazy(leaf.shape, dtype, lambda: bytes_of(as_array(leaf).astype(dtype.array)))


def same_type(leaves: Sequence[Lazy]) -> list[Lazy]:
    """The tensors in the narrowest type that holds them all exactly."""
    names = {leaf.dtype.name for leaf in leaves}
    if len(names) == 1:
        return list(leaves)
    wide = "F64" if "F64" in names else "F32"
    return [widened(leaf, wide) for leaf in leaves]


def equal(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors hold the same bits; tensors that lie in the same place are not read."""
    if one is other or (one.span is not None and one.span == other.span):
        return one.shape == other.shape
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same and bytes(one.fetch()) == bytes(other.fetch())
