"""The compiled inner loops of a merge: `native/merge.c` for base + B @ A, `native/normalize.c` for DoRA.

Both loops round once, and are several times as fast as numpy's float64 path. Bounds on their errors prove that they
give the same bits. `merge.c` computes in float32, and repeats an element in float64 if the bound does not decide its
rounding. `normalize.c` computes in float64.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, cast

from .. import native

if TYPE_CHECKING:
    import numpy as np

    from ..io.lazy import Array, DType

WRITTEN = ("BF16", "F16")
"""Element types that the loops write. A float32 output needs every sum in float64, where numpy is as fast."""

PANEL, FILLED, CHUNK = 16, 32, 16

LEAST = 1 << 14
"""Smallest number of elements in a block for which calling the library is worthwhile."""


class _Factors(ctypes.Structure):
    _fields_ = [
        ("left", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("row_bound", ctypes.c_void_p),
        ("column_bound", ctypes.c_void_p),
        ("left64", ctypes.c_void_p),
        ("right64", ctypes.c_void_p),
        ("row_norm", ctypes.c_void_p),
        ("column_norm", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
    ]


class _Normalized(ctypes.Structure):
    _fields_ = [
        ("left", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("magnitude", ctypes.c_void_p),
        ("row_norm", ctypes.c_void_p),
        ("column_norm", ctypes.c_void_p),
        ("column_length", ctypes.c_double),
        ("change", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
    ]


def takes(source: DType, target: DType) -> bool:
    """Whether the library is available and converts between these element types."""
    return source.name in native.KINDS and target.name in WRITTEN and native.loops() is not None


class LowRankSum:
    """A change `left @ right`, prepared once for all blocks of a tensor.

    Args:
        left: float64 `[rows, rank]`, with scaling and weight.
        right: float64 `[rank, width]`.
    """

    def __init__(self, left: Array, right: Array) -> None:
        import numpy as np

        rank, width = right.shape
        padded = -(-width // FILLED) * FILLED
        self.rows, self.width, self.rank = len(left), width, rank
        with np.errstate(over="ignore"):
            self._panels = _panels(right, padded, np.float32)
            self._left = np.ascontiguousarray(left, np.float32)
        self._left64, self._right64 = np.ascontiguousarray(left), np.ascontiguousarray(right.T)
        # By the Cauchy-Schwarz inequality, sum_k w_k |b_k| |a_k| is at most the product of the norms of b and a, both
        # weighted by w.
        weights = np.sqrt(_roundings(rank))
        rows, columns = _norms(left * weights), _norms(right.T * weights)
        self._row_bound = _upwards(rows, 2.0**-24)
        self._column_bound = np.zeros(padded, np.float32)
        self._column_bound[:width] = _upwards(columns, 1.0)
        self._row_norm, self._column_norm = _double_bounds(rows, columns, rank)

    def write(self, raw: Array, out: Array, kinds: tuple[DType, DType], start: int, stop: int) -> float | None:
        """Write raw + rows `start` to `stop` of the change into `out`, rounded once; both are flat.

        Returns:
            0.0, because no change depends on the base. None if the rounding of an element is uncertain even in float64:
            then numpy must compute the block, and `out` is undefined.
        """
        loaded = cast("ctypes.CDLL", native.loops())
        factors = _Factors(
            left=self._left[start:].ctypes.data,
            panels=self._panels.ctypes.data,
            row_bound=self._row_bound[start:].ctypes.data,
            column_bound=self._column_bound.ctypes.data,
            left64=self._left64[start:].ctypes.data,
            right64=self._right64.ctypes.data,
            row_norm=self._row_norm[start:].ctypes.data,
            column_norm=self._column_norm.ctypes.data,
            rank=self.rank,
        )
        source, target = (native.KINDS[kind.name] for kind in kinds)
        pointers = raw.ctypes.data, out.ctypes.data
        open_: int = loaded.adapterkit_add(source, target, *pointers, stop - start, self.width, ctypes.byref(factors))
        return 0.0 if open_ == 0 else None


class NormalizedSum:
    """An update m * V / |V| by rows, V = W + left @ right, prepared once for all blocks of a tensor.

    Args:
        magnitude: float64 m, `[rows]`.
        left: float64 `[rows, rank]`, with scaling.
        right: float64 `[rank, width]`.
    """

    def __init__(self, magnitude: Array, left: Array, right: Array) -> None:
        import numpy as np

        rank, width = right.shape
        padded = -(-width // PANEL) * PANEL
        self.rank, self.width = rank, width
        self._magnitude, self._left = np.ascontiguousarray(magnitude), np.ascontiguousarray(left)
        self._panels = _panels(right, padded, np.float64)
        self._row_norm, columns = _double_bounds(_norms(left), _norms(right.T), rank)
        self._column_norm = np.zeros(padded)
        self._column_norm[:width] = columns
        self._column_length = float(np.sqrt(columns @ columns)) * (1 + 1e-9)

    def write(self, raw: Array, out: Array, kinds: tuple[DType, DType], start: int, stop: int) -> float | None:
        """Write rows `start` to `stop` of the new weight into `out`, rounded once. `raw` is the base; both are flat.

        Returns:
            The squared norm of the change. None if the rounding of an element is uncertain, or a norm is zero, infinite
            or out of range: then numpy must compute the block, and `out` is undefined.
        """
        import numpy as np

        loaded = cast("ctypes.CDLL", native.loops())
        change = np.empty(stop - start)
        update = _Normalized(
            left=self._left[start:].ctypes.data,
            panels=self._panels.ctypes.data,
            magnitude=self._magnitude[start:].ctypes.data,
            row_norm=self._row_norm[start:].ctypes.data,
            column_norm=self._column_norm.ctypes.data,
            column_length=self._column_length,
            change=change.ctypes.data,
            rank=self.rank,
        )
        source, target = (native.KINDS[kind.name] for kind in kinds)
        pointers = raw.ctypes.data, out.ctypes.data
        open_: int = loaded.adapterkit_normalize(
            source, target, *pointers, stop - start, self.width, ctypes.byref(update)
        )
        return float(change.sum()) if open_ == 0 else None


def _panels(right: Array, padded: int, dtype: type[np.floating[Any]]) -> Array:
    """Return the columns in groups of 16, `[groups, rank, 16]`, filled up with zeros."""
    import numpy as np

    rank, width = right.shape
    panels = np.zeros((rank, padded), dtype)
    panels[:, :width] = right
    return np.ascontiguousarray(panels.reshape(rank, -1, PANEL).swapaxes(0, 1))


def _double_bounds(rows: Array, columns: Array, rank: int) -> tuple[Array, Array]:
    """Return two arrays whose products bound the distance between two float64 sums of `rank` products in any order.

    Args:
        rows: bounds for the norms of the left factor's rows.
        columns: bounds for the norms of the right factor's columns.
        rank: how many products an element has.
    """
    import numpy as np

    row_norm: Array = np.where(rows == 0, 0.0, rows + 2.0**-300) * ((rank + 4) * 2.0**-51)
    return row_norm, np.where(columns == 0, 0.0, columns + 2.0**-300)


def _roundings(rank: int) -> Array:
    """Return an upper bound for the number of float32 roundings of each product b_k a_k in an element.

    Both factors are rounded; their product is rounded too, unless it is added in the same step. The product's sums are
    rounded: one for each later product in its chunk of 16, and one for its own and each later chunk. One more rounding
    covers two small errors: numpy's float64 sum, whose roundings are 2**-29 times as large, and the squares of all
    these errors.
    """
    import numpy as np

    k = np.arange(rank)
    within = np.minimum(rank - k, CHUNK - k % CHUNK)
    roundings: Array = 3.0 + within + (-(-rank // CHUNK) - k // CHUNK) + 1.0
    return roundings


def _norms(factor: Array) -> Array:
    """Return upper bounds for the norms of the rows; exactly zero for zero rows."""
    import numpy as np

    norms: Array = np.sqrt(np.einsum("ij,ij->i", factor, factor)) * (1 + 1e-9)
    # Bound tiny rows by their maximum: the squares of tiny numbers vanish, and a bound of zero would mean no change.
    tiny = np.abs(factor).max(axis=1, initial=0.0) if norms.min(initial=1.0) < 1e-100 else norms
    return np.where(norms < 1e-100, tiny * math.sqrt(factor.shape[1]), norms)


def _upwards(norms: Array, factor: float) -> Array:
    """Return norms times a factor as float32, rounded up; zero stays zero, and all other values stay away from zero."""
    import numpy as np

    # Add a small number: the product of two bounds must not vanish in float32, or a sum near zero would look exact.
    with np.errstate(over="ignore"):
        bound: Array = np.where(norms == 0, 0.0, (norms + 2.0**-40) * (factor * (1 + 1e-6))).astype(np.float32)
    return bound
