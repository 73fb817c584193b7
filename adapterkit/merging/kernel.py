"""Call the compiled inner loops of a merge: `native/merge.c` for base + B @ A, `native/normalize.c` for DoRA.

Both loops round once, and are several times as fast as the float64 computation with numpy. Their results have the same
bits as numpy's. `merge.c` computes each element in float32, with a bound of the error. If the bound does not determine
how the element is rounded, the loop computes this element again in float64. `normalize.c` computes in float64.
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
"""The dtypes that the loops write.

The dtype float32 is missing, because it needs every sum in float64, for which numpy is as fast.
"""

PANEL, FILLED, CHUNK = 16, 32, 16

LEAST = 1 << 14
"""The smallest number of elements in a block for which a call of the library pays off."""


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
    """Whether the compiled library is available and supports these dtypes."""
    return source.name in native.KINDS and target.name in WRITTEN and native.loops() is not None


class LowRankSum:
    """A change `left @ right` of a tensor, prepared once for all blocks.

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
        # Cauchy-Schwarz inequality: sum_k w_k |b_k| |a_k| is at most the product of the norms of b and a, both weighted
        # by w.
        weights = np.sqrt(_roundings(rank))
        rows, columns = _norms(left * weights), _norms(right.T * weights)
        self._row_bound = _upwards(rows, 2.0**-24)
        self._column_bound = np.zeros(padded, np.float32)
        self._column_bound[:width] = _upwards(columns, 1.0)
        self._row_norm, self._column_norm = _double_bounds(rows, columns, rank)

    def write(self, raw: Array, out: Array, kinds: tuple[DType, DType], start: int, stop: int) -> float | None:
        """Write `raw` plus rows `start` to `stop` of the change into `out`, rounded once. Both arrays are flat.

        Returns:
            0.0, because the change does not depend on the base. None if the rounding of an element is uncertain even in
            float64; `out` is then undefined, and numpy must compute the block.
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
    """A DoRA m * V / |V| (per row, with V = W + left @ right) of a tensor, prepared once for all blocks.

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
        """Write rows `start` to `stop` of the new weight into `out`, rounded once. `raw` contains the base's rows.

        Both are flat.

        Returns:
            The squared norm of the change. None if the rounding of an element is uncertain, or a row's norm is zero,
            infinite or out of range; `out` is then undefined, and numpy must compute the block.
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
    """Return the columns in groups of 16, `[groups, rank, 16]`, padded with zeros."""
    import numpy as np

    rank, width = right.shape
    panels = np.zeros((rank, padded), dtype)
    panels[:, :width] = right
    return np.ascontiguousarray(panels.reshape(rank, -1, PANEL).swapaxes(0, 1))


def _double_bounds(rows: Array, columns: Array, rank: int) -> tuple[Array, Array]:
    """Return two arrays; entry i of the first times entry j of the second bounds the error of element (i, j).

    The error is the effect of the order of summation on the element, a float64 sum of `rank` products.

    Args:
        rows: upper bounds for the norms of the left factor's rows.
        columns: upper bounds for the norms of the right factor's columns.
        rank: the number of products in each sum.
    """
    import numpy as np

    row_norm: Array = np.where(rows == 0, 0.0, rows + 2.0**-300) * ((rank + 4) * 2.0**-51)
    return row_norm, np.where(columns == 0, 0.0, columns + 2.0**-300)


def _roundings(rank: int) -> Array:
    """Return, for each product b_k a_k of an element, an upper bound for the number of its float32 roundings.

    Both factors are rounded, and so is the product, unless a fused multiply-add adds it without rounding. Each sum that
    contains the product is rounded: one for each later product in the same chunk of 16, and one for this chunk and each
    later chunk. One more rounding covers two small errors: the roundings of numpy's float64 sum, which are 2**-29 times
    as large, and the squares of all these errors.
    """
    import numpy as np

    k = np.arange(rank)
    within = np.minimum(rank - k, CHUNK - k % CHUNK)
    roundings: Array = 3.0 + within + (-(-rank // CHUNK) - k // CHUNK) + 1.0
    return roundings


def _norms(factor: Array) -> Array:
    """Return upper bounds for the norms of the rows, and exactly zero for zero rows."""
    import numpy as np

    norms: Array = np.sqrt(np.einsum("ij,ij->i", factor, factor)) * (1 + 1e-9)
    # Bound rows of tiny numbers by their maximum, because the squares underflow to zero, and a bound of zero would mean
    # no change.
    tiny = np.abs(factor).max(axis=1, initial=0.0) if norms.min(initial=1.0) < 1e-100 else norms
    return np.where(norms < 1e-100, tiny * math.sqrt(factor.shape[1]), norms)


def _upwards(norms: Array, factor: float) -> Array:
    """Return norms times a factor as float32, rounded up; zero stays zero, and other values stay above zero."""
    import numpy as np

    # Add a small number, so that the product of two bounds does not underflow in float32. With a bound of zero, a sum
    # near zero would look exact.
    with np.errstate(over="ignore"):
        bound: Array = np.where(norms == 0, 0.0, (norms + 2.0**-40) * (factor * (1 + 1e-6))).astype(np.float32)
    return bound
