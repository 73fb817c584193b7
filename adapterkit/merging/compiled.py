"""Compute low-rank changes and DoRA with the compiled loops `native/merge.c` and `native/normalize.c`.

Both loops round each element only once. They are several times as fast as numpy in float64, and write the same bits.
`merge.c` computes each element in float32, and also computes a bound on the element's error. If values within this
bound round to different outputs, the loop computes the element again in float64. `normalize.c` always computes in
float64.

Adapters often change only parts of a tensor, such as q, k and v in one fused weight. So the rows are cut into segments:
all rows of a segment are changed by the same updates. The factors of a segment's updates are joined into one product.
If a segment has a DoRA and another update, numpy computes the whole tensor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from .. import native
from ..core.updates import Additive, Update, WeightUpdate

if TYPE_CHECKING:
    import numpy as np

    from ..io.lazy import Array, DType
    from ..linalg.namespace import Numbers
    from .blocks import Block
    from .planned import Output
    from .planned_update import PlannedUpdate


THIN = 256
"""The largest rank of joined factors. If their rank would be higher, numpy computes the change."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a stored tensor that are changed by the same planned updates.

    Attributes:
        start: the first row. In a stacked tensor, the rows of each expert are counted from 0.
        stop: the row after the last row.
        changes: the indices of the planned updates that change these rows.
    """

    start: int
    stop: int
    changes: tuple[int, ...]


def lowrank_blocks(output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]]) -> LowRankBlocks | None:
    """Return an output's changes for the compiled loops; None if the loops do not support the dtypes or the changes.

    Args:
        output: the output tensor.
        folds: each planned update of the output with its loaded updates, whose tensors are numpy arrays.
    """
    shape, stacked = output.shape, any(fold.target.stacked for fold, _ in folds)
    if not folds or len(shape) < 2 + stacked or not takes(output.source.dtype, output.dtype):
        return None
    normalizing = [_is_normalizing(fold, updates, stacked) for fold, updates in folds]
    if not all(norm or _is_sum(fold, shape, stacked) for norm, (fold, _) in zip(normalizing, folds, strict=True)):
        return None
    segments = _segments([fold for fold, _ in folds], shape[int(stacked)])
    if any(len(each.changes) > 1 and any(normalizing[position] for position in each.changes) for each in segments):
        return None
    return LowRankBlocks(output, folds, segments)


def _is_sum(fold: PlannedUpdate, shape: tuple[int, ...], stacked: bool) -> bool:
    """Whether the loop can add the change to the stored tensor row by row, provided that the change has a low rank.

    This function does not check the rank; `_joined` checks it later.
    """
    if not fold.additive or fold.bias or fold.target.stacked != stacked:
        return False
    if fold.axis == "out":
        return True
    # The tensor is stored as `[in, out]`. Refuse a target with `rows`, because these rows are columns of the tensor.
    # Refuse a weight with kernel axes, because A of shape `[r, in * k]` has more columns than the tensor has rows.
    return fold.target.rows is None and len(shape) == 2 + stacked


def _is_normalizing(fold: PlannedUpdate, updates: list[Update], stacked: bool) -> bool:
    """Whether the change is one update with weight 1, and it scales each stored row to a given norm, as DoRA does."""
    if len(updates) != 1 or fold.weight != 1 or fold.bias or fold.target.stacked != stacked or fold.axis != "out":
        return False
    first = updates[0]
    return isinstance(first, WeightUpdate) and type(first).normalized is not WeightUpdate.normalized


def _segments(folds: Sequence[PlannedUpdate], rows: int) -> list[Segment]:
    """Cut the rows into segments at the rows where a change begins or ends."""
    spans = [_span(fold, rows) for fold in folds]
    cuts = sorted({0, rows, *(row for span in spans for row in span)})
    return [
        Segment(start, stop, tuple(i for i, (first, last) in enumerate(spans) if first <= start and stop <= last))
        for start, stop in pairwise(cuts)
    ]


def _span(fold: PlannedUpdate, rows: int) -> tuple[int, int]:
    if fold.target.rows is not None:
        return fold.target.rows
    # The base may have more rows than the adapter was trained with, such as rows for added tokens. The adapter does not
    # change these last rows.
    return (0, rows) if fold.target.stacked else (0, min(rows, fold.shape[0]))


class LowRankBlocks:
    """The changes of one output tensor, as factors for the compiled loops."""

    def __init__(
        self, output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]], segments: Sequence[Segment]
    ) -> None:
        self.output, self.folds, self.segments = output, folds, segments
        self.width = math.prod(output.shape[1 + folds[0][0].target.stacked :])
        self._expert: int | None = None
        self._sums: dict[Segment, LowRankSum | NormalizedSum | None] = {}

    def write(self, raw: Numbers, out: Numbers, block: Block) -> dict[int, float] | None:
        """Compute a block of the merged tensor into `out`, from the base's block `raw`. Both arrays are flat.

        Returns:
            {index of a planned update: squared norm of its change}, for the changes that depend on the base. None if
            numpy must compute the block: the block has fewer than `LEAST` elements, the loops cannot compute a change,
            or the rounding of an element is uncertain. The content of `out` is then undefined.
        """
        import numpy as np

        if block.elements < LEAST:
            return None
        norms: dict[int, float] = {}
        if block.expert != self._expert:
            self._expert, self._sums = block.expert, {}
        given, outputs = cast("tuple[Array, Array]", (raw, out))
        for segment in self.segments:
            start, stop = max(segment.start, block.start), min(segment.stop, block.stop)
            if start >= stop:
                continue
            here = slice((start - block.start) * self.width, (stop - block.start) * self.width)
            if not segment.changes:
                np.copyto(outputs[here], given[here], casting="unsafe")
                continue
            change = self._sum(segment)
            kinds = self.output.source.dtype, self.output.dtype
            rows = start - segment.start, stop - segment.start
            norm = None if change is None else change.write(given[here], outputs[here], kinds, *rows)
            if norm is None:
                return None
            if isinstance(change, NormalizedSum):
                position = segment.changes[0]
                norms[position] = norms.get(position, 0.0) + norm
        return norms

    def _sum(self, segment: Segment) -> LowRankSum | NormalizedSum | None:
        if segment not in self._sums:
            self._sums[segment] = self._normalized(segment) or self._joined(segment)
        return self._sums[segment]

    def _normalized(self, segment: Segment) -> NormalizedSum | None:
        """Return the prepared DoRA of a segment; None if the segment has no DoRA."""
        fold, (update, *_) = self.folds[segment.changes[0]]
        update_here = update if self._expert is None else update.expert(self._expert)
        parts = update_here.normalized() if isinstance(update_here, WeightUpdate) else None
        if parts is None:
            return None
        magnitude, B, A = cast("tuple[Array, Array, Array]", parts)
        offset = _span(fold, segment.stop)[0]
        rows = slice(segment.start - offset, segment.stop - offset)
        return NormalizedSum(magnitude[rows], B[rows], A)

    def _joined(self, segment: Segment) -> LowRankSum | None:
        """Join all changes of a segment into one product.

        Return None if a change is not a low-rank product, or if the rank of the joined product is above `THIN`.
        """
        import numpy as np

        lefts, rights = [], []
        for fold, updates in (self.folds[position] for position in segment.changes):
            for update in updates:
                update_here = update if self._expert is None else update.expert(self._expert)
                pair = update_here.pair(fold.logical) if isinstance(update_here, Additive) else None
                if pair is None:
                    return None
                B, A = cast("tuple[Array, Array]", pair)
                # Transpose the product if the weight is stored as `[in, out]`.
                left, right = (B, A) if fold.axis == "out" else (A.T, B.T)
                offset = _span(fold, segment.stop)[0]
                lefts.append(fold.weight * left[segment.start - offset : segment.stop - offset])
                rights.append(right)
        if sum(len(right) for right in rights) > THIN:
            return None
        return LowRankSum(np.concatenate(lefts, axis=1), np.concatenate(rights))


WRITTEN = ("BF16", "F16")
"""The dtypes that the loops write.

The loops do not write float32. For float32, `merge.c` would have to compute every sum in float64, and numpy is just as
fast as `merge.c` in float64.
"""

PANEL, FILLED, CHUNK = 16, 32, 16

LEAST = 1 << 14
"""Numpy computes blocks with fewer elements, because a call of the compiled library does not pay off for them."""


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
        left: float64 `[rows, rank]`, already multiplied by the scaling and the weight.
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
        # An element is the sum of the products b_k a_k. If product k is rounded w_k times, the element's error is at
        # most 2**-24 times `sum_k w_k |b_k| |a_k|`. By the Cauchy-Schwarz inequality, this sum is at most the norm of
        # `sqrt(w) * b` times the norm of `sqrt(w) * a`.
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
            float64; the content of `out` is then undefined, and numpy must compute the block.
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
    """A DoRA of a tensor, prepared once for all blocks: `m * V / |V|` for each row of `V = W + left @ right`.

    Args:
        magnitude: m, float64 `[rows]`.
        left: float64 `[rows, rank]`, already multiplied by the scaling.
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

        Both arrays are flat.

        Returns:
            The squared norm of the change. None if the rounding of an element is uncertain, or if |V| of a row is zero,
            infinite or out of the loop's range. The content of `out` is then undefined, and numpy must compute the
            block.
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
    """Pad `right` with zero columns to the width `padded`, and split it into groups of 16 columns.

    Returns:
        `[groups, rank, 16]`.
    """
    import numpy as np

    rank, width = right.shape
    panels = np.zeros((rank, padded), dtype)
    panels[:, :width] = right
    return np.ascontiguousarray(panels.reshape(rank, -1, PANEL).swapaxes(0, 1))


def _double_bounds(rows: Array, columns: Array, rank: int) -> tuple[Array, Array]:
    """Return two arrays that bound the errors of a product of two factors in float64.

    The error of element (i, j) is at most entry i of the first array times entry j of the second array. The element is
    a sum of `rank` products, and its error is how much the sum can differ if the products are added in another order.

    Args:
        rows: upper bounds for the norms of the left factor's rows.
        columns: upper bounds for the norms of the right factor's columns.
        rank: the number of products in each sum.
    """
    import numpy as np

    row_norm: Array = np.where(rows == 0, 0.0, rows + 2.0**-300) * ((rank + 4) * 2.0**-51)
    return row_norm, np.where(columns == 0, 0.0, columns + 2.0**-300)


def _roundings(rank: int) -> Array:
    """Return an upper bound for the number of float32 roundings of each product `b_k a_k` in the sum of an element.

    The products are added in chunks of 16, and then the chunks are added. The bound counts these roundings:

    - three for the two factors and the product; a fused multiply-add does not round the product;
    - one when the product is added to its chunk, and one for each later product of the chunk;
    - one when the chunk is added to the element, and one for each later chunk;
    - one to cover two small errors. The first comes from the float64 roundings of numpy's sum; each of these roundings
      is 2**-29 times as large as a float32 rounding. The second comes from the squares of all these errors.
    """
    import numpy as np

    k = np.arange(rank)
    within = np.minimum(rank - k, CHUNK - k % CHUNK)
    roundings: Array = 3.0 + within + (-(-rank // CHUNK) - k // CHUNK) + 1.0
    return roundings


def _norms(factor: Array) -> Array:
    """Return an upper bound for the norm of each row. The bound of a zero row is exactly zero."""
    import numpy as np

    norms: Array = np.sqrt(np.einsum("ij,ij->i", factor, factor)) * (1 + 1e-9)
    # The squares of tiny elements underflow to zero. So if a row has only tiny elements, compute its bound from its
    # largest element. A bound of zero would mean that the row does not change the weight.
    tiny = np.abs(factor).max(axis=1, initial=0.0) if norms.min(initial=1.0) < 1e-100 else norms
    return np.where(norms < 1e-100, tiny * math.sqrt(factor.shape[1]), norms)


def _upwards(norms: Array, factor: float) -> Array:
    """Return `norms * factor` in float32, rounded up. The result is zero only if the norm is zero."""
    import numpy as np

    # Add a small number, so that the product of two bounds does not underflow to zero in float32. A bound of zero would
    # mean that the sum is exact.
    with np.errstate(over="ignore"):
        bound: Array = np.where(norms == 0, 0.0, (norms + 2.0**-40) * (factor * (1 + 1e-6))).astype(np.float32)
    return bound
