"""Split, join, transpose and scale lazy tensors, for conversions between formats.

Only `times` computes new values. All other functions move elements, add zeros, or convert to a wider dtype. So a
conversion followed by its inverse restores the bytes, unless a tensor was scaled or converted to a wider dtype. The
source tensors are read only when a result is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Malformed
from .lazy import (
    DTYPES,
    TAKE_OUT,
    DoesNotFit,
    DType,
    Lazy,
    Span,
    as_array,
    as_lazy,
    bytes_of,
    first_in,
    first_not_finite,
)

if TYPE_CHECKING:
    from .lazy import Array, Leaf

    Order = Callable[[], Array]

AT_ONCE = 1 << 18
"""A tensor of at most this many bytes is read whole from its file, even if only parts of it are needed. Three small
reads would take longer than one read of this size."""

REAL = ("F64", "F32", "F16", "BF16")
"""The dtypes that all adapter formats for language models support."""


def turned(leaf: Lazy) -> Lazy:
    """Return a tensor with its last two axes swapped. Swapping the result again returns the original object.

    Some formats store transposed factors. When a written file is checked, its reader swaps the axes again and gets the
    original object. So the check does not transpose the data a second time.
    """
    *lead, rows, columns = leaf.shape
    shape = (*lead, columns, rows)
    # Compare the shapes too, because `reshape` changes the shape but not the source.
    if isinstance(leaf.source, _Turned) and leaf.source.leaf.shape == shape:
        return leaf.source.leaf
    return Lazy(shape, leaf.dtype, _Turned(leaf))


@dataclass(frozen=True, slots=True, eq=False)
class _Turned:
    """Reads a tensor with its last two axes swapped.

    Attributes:
        leaf: the tensor before the swap.
    """

    leaf: Lazy

    def __call__(self) -> memoryview:
        return bytes_of(self.leaf.numpy().swapaxes(-1, -2))


def is_moved(leaf: Lazy) -> bool:
    """Whether a tensor's values come unchanged from a file. The tensor's last two axes may have been swapped."""
    return leaf.span is not None or (isinstance(leaf.source, _Turned) and is_moved(leaf.source.leaf))


def runs(leaf: Lazy, places: Sequence[tuple[int, int]]) -> list[bytes] | None:
    """Read several contiguous ranges of a tensor's elements. Return None if only the whole tensor can be read.

    Args:
        leaf: the tensor.
        places: the ranges, each as the index of the first element in C order and the number of elements.

    Returns:
        The bytes of each range.
    """
    if leaf.span is not None and leaf.nbytes <= AT_ONCE:
        data, size = memoryview(leaf.fetch()), leaf.dtype.itemsize
        return [bytes(data[first * size : (first + count) * size]) for first, count in places]
    if leaf.part is not None or leaf.span is not None:
        return [bytes(leaf.read(first, count)) for first, count in places]
    if not isinstance(leaf.source, _Turned) or len(leaf.source.leaf.shape) != 2:
        return None
    # Each range of elements lies in a few rows of the transposed matrix. Copy only these rows into C order.
    swapped = leaf.source.leaf.numpy().T
    width = swapped.shape[1]
    rows = []
    for first, count in places:
        start, stop = first // width, -(-(first + count) // width)
        block = swapped[start:stop].reshape(-1)
        rows.append(bytes(bytes_of(block[first - start * width :][:count])))
    return rows


def reordered(leaf: Lazy, order: Order, axis: int = 0) -> Lazy:
    """Permute positions along an axis: position i of the result is position `order()[i]` of the tensor."""
    return leaf.map(lambda a: a.take(order(), axis), leaf.shape)


def part(leaf: Lazy, start: int, stop: int, axis: int = 0, step: int = 1) -> Lazy:
    """Slice a tensor along an axis: take every `step`-th position from `start` up to but not including `stop`.

    Raises:
        DoesNotFit: the tensor does not have these positions.
    """
    at = axis % len(leaf.shape)
    if not 0 <= start <= stop <= leaf.shape[at]:
        why = f"axis {at} of a tensor of shape {list(leaf.shape)} does not have positions {start} to {stop}"
        raise DoesNotFit(why, cure=TAKE_OUT)
    if (start, stop, step) == (0, leaf.shape[at], 1):
        return leaf
    shape = (*leaf.shape[:at], len(range(start, stop, step)), *leaf.shape[at + 1 :])
    return leaf.map(lambda a: a[(slice(None),) * at + (slice(start, stop, step),)], shape)


def spread(leaf: Lazy, size: int, start: int, step: int, axis: int = 0) -> Lazy:
    """Spread a tensor along an axis: move position i to position `start + i * step`, and put zeros elsewhere.

    The axis of the result has length `size`.
    """
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])

    def fetch() -> memoryview:
        import numpy as np

        whole = np.zeros(shape, leaf.dtype.numpy)
        whole[(slice(None),) * axis + (slice(start, None, step),)] = leaf.numpy()
        return bytes_of(whole)

    return Lazy(shape, leaf.dtype, fetch)


def item(leaf: Lazy, index: int) -> Lazy:
    """Return `leaf[index]`, an item along the first axis. Only this item is read from the file."""
    return run(leaf, index * math.prod(leaf.shape[1:]), leaf.shape[1:])


def run(leaf: Lazy, first: int, shape: tuple[int, ...]) -> Lazy:
    """Return consecutive elements of a tensor, from element `first` in C order, as a tensor of shape `shape`.

    Only these elements are read from the file. Some files store many factors in one array, so reading the whole array
    for each factor would take long.
    """
    count = math.prod(shape)
    span = None
    if leaf.span is not None:
        size = leaf.dtype.itemsize
        span = Span(leaf.span.path, leaf.span.offset + first * size, count * size)
    part = None if leaf.part is None else lambda start, n: leaf.read(first + start, n)
    return Lazy(shape, leaf.dtype, lambda: leaf.read(first, count), span, part)


def joined(leaves: Sequence[Lazy], axis: int = 0) -> Lazy:
    """Concatenate tensors along an axis. The dtype of the result can represent all values exactly; see `same_type`."""
    alike = same_type(leaves)
    shape = list(alike[0].shape)
    shape[axis] = sum(leaf.shape[axis] for leaf in alike)

    def fetch() -> memoryview:
        import numpy as np

        return bytes_of(np.concatenate([leaf.numpy() for leaf in alike], axis))

    return alike[0] if len(alike) == 1 else Lazy(tuple(shape), alike[0].dtype, fetch)


def stacked(leaves: Sequence[Lazy]) -> Lazy:
    """Stack tensors of the same shape along a new first axis."""
    return joined([leaf.reshape(1, *leaf.shape) for leaf in leaves])


def overlaid(leaves: Sequence[Lazy]) -> Lazy:
    """Merge tensors of the same shape into one. At each index, at most one of the tensors may be nonzero."""
    alike = same_type(leaves)

    def fetch() -> memoryview:
        import numpy as np

        whole = alike[0].numpy().copy()
        for leaf in alike[1:]:
            values = leaf.numpy()
            # Compare the values, not their bits: the bits of -0.0 are not all zero.
            np.copyto(whole, values, where=as_array(leaf) != 0)
        return bytes_of(whole)

    return Lazy(alike[0].shape, alike[0].dtype, fetch)


def block_diagonal(leaves: Sequence[Lazy]) -> Lazy:
    """Return the block-diagonal matrix whose blocks are the given matrices."""
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
    """Append zeros along an axis, up to length `size`."""
    lack = size - leaf.shape[axis]
    if not lack:
        return leaf
    shape = list(leaf.shape)
    shape[axis] = lack
    return joined([leaf, zeros(tuple(shape), leaf.dtype)], axis)


def zeros(shape: tuple[int, ...], dtype: DType) -> Lazy:
    """Return a tensor of zeros; it takes no memory until it is fetched."""
    return Lazy(shape, dtype, lambda: bytes(math.prod(shape) * dtype.itemsize))


def times(tensor: Leaf, factor: float) -> Lazy:
    """Multiply a tensor by a number. The products are computed in float64, and rounded once to the tensor's dtype.

    Fetching the result raises `Malformed` in two cases:

    - All elements of the tensor are finite, but a product overflows the dtype.
    - The largest product is not zero, but is smaller than the dtype's smallest normal number. So all products would
      lose digits or become zero.
    """
    cure = "Write a format that stores the scaling and the factors separately, such as --to adapterkit "
    cure += "(format='adapterkit')"
    leaf = as_lazy(tensor)

    def fetch() -> memoryview:
        import ml_dtypes
        import numpy as np

        with np.errstate(over="ignore", under="ignore"):
            exact = as_array(leaf).astype("f8") * factor
            rounded = exact.astype(leaf.dtype.array)
        # Accept a NaN or infinity if the source has one: the multiplication did not cause it.
        place = first_in(rounded.view(leaf.dtype.numpy), leaf.dtype)
        if place is not None and first_not_finite(leaf) is None:
            why = f"a scaling of {factor:g} moves the element at {list(place)} out of the range of {leaf.dtype}"
            raise Malformed(why, cure=cure)
        largest = float(np.abs(exact).max(initial=0))
        limits: Any = ml_dtypes.finfo
        if 0 < largest < float(limits(leaf.dtype.array).smallest_normal):
            why = f"a scaling of {factor:g} makes all elements so small that {leaf.dtype} would lose digits"
            raise Malformed(why, cure=cure)
        return bytes_of(rounded)

    return Lazy(leaf.shape, leaf.dtype, fetch)


def widened(leaf: Lazy, name: str) -> Lazy:
    """Convert a tensor to the dtype `name`. The conversion is exact if this dtype is wider than the tensor's."""
    if leaf.dtype.name == name:
        return leaf
    dtype = DTYPES[name]
    return Lazy(leaf.shape, dtype, lambda: bytes_of(as_array(leaf).astype(dtype.array)))


def same_type(leaves: Sequence[Lazy]) -> list[Lazy]:
    """Convert tensors to one dtype that represents all their values exactly.

    If all tensors have the same dtype, they keep it. Otherwise the dtype is F64 if one of them is F64, else F32.
    """
    names = {leaf.dtype.name for leaf in leaves}
    if len(names) == 1:
        return list(leaves)
    # A mix of BF16 and F16 becomes F32, because neither BF16 nor F16 can represent all values of the other.
    wide = "F64" if "F64" in names else "F32"
    return [widened(leaf, wide) for leaf in leaves]


def equal(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors have equal bytes. If both are the same span of the same file, no data is read."""
    if one is other or (one.span is not None and one.span == other.span):
        return one.shape == other.shape
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same and bytes(one.fetch()) == bytes(other.fetch())
