"""Tensors that are computed when they are read: scaled, summed or joined.

The results are computed in float64 and rounded once. Joining tensors of the same dtype keeps all bits.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from ..errors import Malformed, storage_error
from .lazy import DTYPES, Buffer, DType, Lazy, as_lazy, check_finite

if TYPE_CHECKING:
    import numpy as np

    from .lazy import Array as Array
    from .lazy import Leaf, Shape


def load(leaf: Leaf) -> Array:
    """Read a tensor as a numpy array. Floating-point numbers become float64; integers keep their dtype.

    Raises:
        Malformed: the tensor contains a NaN or an infinity.
    """
    tensor = as_lazy(leaf)
    values = _checked(tensor)
    return values.view(tensor.dtype.array).astype("<f8") if tensor.dtype.floating else values


def computed(shape: Sequence[int], dtype: DType, make: Callable[[], Array]) -> Lazy:
    """Return a lazy tensor that calls `make` each time it is read, and rounds the returned array to `dtype`."""

    def fetch() -> Buffer:
        return _bytes_of(rounded(make(), dtype))

    return Lazy(tuple(shape), dtype, fetch)


def rounded_lazy(values: Array, dtype: DType) -> Lazy:
    """Return a lazy tensor with the given values, rounded once to `dtype`."""
    kept = rounded(values, dtype)
    return Lazy(tuple(kept.shape), dtype, kept.tobytes)


def rounded(values: Array, dtype: DType) -> Array:
    """Return the values rounded to `dtype`, as an array in C order.

    Raises:
        Malformed: a value is not finite, or overflows the dtype.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.ascontiguousarray(values, dtype=dtype.array)
    if dtype.floating and not np.isfinite(kept).all():
        cure = "Choose smaller weights for the adapters (--weight, weights=), or a wider dtype (--dtype, dtype=)"
        raise Malformed(f"a result is out of the range of {dtype}", cure=cure)
    return kept


def times(leaf: Leaf, factor: float) -> Leaf:
    """Multiply a tensor by a number.

    Float32 and float64 tensors keep their dtype. Other tensors become float32, unless the products are exact in the
    tensor's dtype.
    """
    if factor == 1:
        return leaf
    return computed(leaf.shape, _exact_type(as_lazy(leaf).dtype, factor), lambda: load(leaf) * factor)


def total(leaves: Sequence[Leaf], factors: Sequence[float], shape: Shape | None = None) -> Leaf:
    """Return the sum of `factors[i] * leaves[i]`, with the shape `shape` (None: the shape of the first tensor).

    The result's dtype is float64 if one of the tensors is float64, otherwise float32. Exception: with a single tensor
    and no `shape`, this function returns the result of `times`, which may keep the tensor's own dtype.
    """
    if len(leaves) == 1 and shape is None:
        return times(leaves[0], factors[0])
    shape = tuple(leaves[0].shape) if shape is None else shape

    def make() -> Array:
        terms = (load(leaf).reshape(shape) * factor for leaf, factor in zip(leaves, factors, strict=True))
        result: Array = sum(terms)  # type: ignore[assignment]
        return result

    return computed(shape, wide(leaves), make)


def joined(leaves: Sequence[Leaf], axis: int, factors: Sequence[float] | None = None) -> Leaf:
    """Concatenate tensors along a non-negative axis. If `factors` is given, first multiply tensor i by `factors[i]`."""
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
    """Return the dtype for the product of a tensor and a factor.

    Float32 and float64 tensors keep their dtype. Narrower tensors keep it only if the product is exact, and otherwise
    become float32. A change of sign is always exact. Multiplying by a power of two changes only the exponent. In BF16,
    such a product counts as exact, because BF16 has the wide exponent range of float32. In F16, such a product may be
    inexact, because F16's exponent range is narrow.
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
    """Read and concatenate tensors. Each is copied right after it is read, while its data is still in the CPU cache."""
    import numpy as np

    # Allocate the result first and copy each part into it: np.concatenate would need all parts in memory at once.
    joined, end = np.empty(shape, dtype), 0
    for part in parts:
        start, end = end, end + part.shape[axis]
        joined[(slice(None),) * axis + (slice(start, end),)] = read(part)
    return joined


def _bytes_of(array: Array) -> memoryview:
    """Return an array's memory as bytes, without a copy."""
    flat: Any = array.reshape(-1).view("u1")
    return memoryview(flat)


def _checked(leaf: Lazy) -> Array:
    """Read the values in the stored dtype, and check that all of them are finite."""
    values = leaf.numpy()
    check_finite(leaf, values=values)
    return values


# Keep computed tensors until they are written: in memory up to a limit, and above the limit in a temporary file.
#
# The output can be written only after all targets have been computed, because the last target may still raise an error.
# Until then, the combination of eight adapters with 224 targets of `4096 x 4096` can take a gigabyte of memory, because
# the rank of the combination can be the sum of the adapters' ranks.


IN_MEMORY = 64 << 20
"""The largest total size of the tensors in memory, in bytes. All other tensors go to the temporary file."""


class Spool:
    """Keep computed tensors in memory and, above a limit, in a temporary file. Threads may share a spool.

    The temporary file is removed when the spool and all its tensors have been deleted.

    Args:
        memory: the largest total size of the tensors in memory, in bytes.
    """

    def __init__(self, memory: int = IN_MEMORY) -> None:
        self.memory, self._used, self._end = memory, 0, 0
        self._lock = Lock()
        self._file: BinaryIO | None = None

    def rounded_lazy(self, values: Array, dtype: DType) -> Lazy:
        """Keep the given values, rounded once to `dtype`, and return them as a lazy tensor.

        Raises:
            Malformed: a value overflows the dtype, or is not finite.
            StorageError: there is no space for the temporary file.
        """
        kept = rounded(values, dtype)
        with self._lock:
            if self._used + kept.nbytes <= self.memory:
                self._used += kept.nbytes
                return rounded_lazy(kept, dtype)
            try:
                start = self._append(kept)
            except OSError as error:
                raise storage_error(error, Path(tempfile.gettempdir())) from None
        # Copy the shape and size into variables, so that the lazy tensor's function does not keep the array in memory.
        shape, count = tuple(kept.shape), kept.nbytes
        return Lazy(shape, dtype, lambda: self._read(start, count))

    def _append(self, kept: Array) -> int:
        if self._file is None:
            self._file = cast("BinaryIO", tempfile.TemporaryFile(prefix="adapterkit-"))  # noqa: SIM115 - closed below
            # Each lazy tensor refers to the spool, so the file is closed when the last tensor is deleted.
            weakref.finalize(self, self._file.close)
        start = self._end
        self._file.seek(start)
        self._file.write(kept.reshape(-1).view("u1").data)
        self._file.flush()
        self._end += kept.nbytes
        return start

    def _read(self, start: int, count: int) -> bytes:
        assert self._file is not None
        with self._lock:
            self._file.seek(start)
            data = self._file.read(count)
        if len(data) != count:
            raise storage_error(OSError(errno.EIO, os.strerror(errno.EIO)), Path(tempfile.gettempdir()))
        return data
