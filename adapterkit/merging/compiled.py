"""Blocks of a tensor for the compiled loop, whose changes are all low-rank products of numpy arrays.

Adapters often change only parts of a tensor, such as q, k and v in one fused weight. The rows are cut into segments
with the same changes, and the factors of all changes in a segment are joined into one product.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from .. import native
from ..core.updates import Additive, Update

if TYPE_CHECKING:
    from ..io.lazy import Array, DType
    from ..linalg.namespace import Numbers
    from .blocks import Block
    from .planned import Output
    from .planned_update import PlannedUpdate

THIN = 256
"""Largest rank for which factors of several adapters are joined into one product."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a stored tensor, or of each of its experts, and the positions of the planned updates that change them."""

    start: int
    stop: int
    changes: tuple[int, ...]


def lowrank_blocks(output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]]) -> LowRankBlocks | None:
    """Return the blocks of an output for the compiled loop; None if it does not support the types or the changes.

    Args:
        output: the output tensor.
        folds: the planned updates of the output, with loaded updates as numpy arrays.
    """
    shape, stacked = output.shape, any(fold.target.stacked for fold, _ in folds)
    if not folds or len(shape) < 2 + stacked or not takes(output.source.dtype, output.dtype):
        return None
    if not all(_is_sum(fold, shape, stacked) for fold, _ in folds):
        return None
    return LowRankBlocks(output, folds, _segments([fold for fold, _ in folds], shape[int(stacked)]))


def _is_sum(fold: PlannedUpdate, shape: tuple[int, ...], stacked: bool) -> bool:
    """Whether a change is a sum of products whose rows are rows of the stored tensor."""
    if not fold.additive or fold.bias or fold.target.stacked != stacked:
        return False
    if fold.axis == "out":
        return True
    # Refuse a target with rows (they are columns of the tensor) or with a kernel (its axes are not in the rows).
    return fold.target.rows is None and len(shape) == 2 + stacked


def _segments(folds: Sequence[PlannedUpdate], rows: int) -> list[Segment]:
    """Cut the rows where a change begins or ends."""
    spans = [_span(fold, rows) for fold in folds]
    cuts = sorted({0, rows, *(row for span in spans for row in span)})
    return [
        Segment(start, stop, tuple(i for i, (first, last) in enumerate(spans) if first <= start and stop <= last))
        for start, stop in pairwise(cuts)
    ]


def _span(fold: PlannedUpdate, rows: int) -> tuple[int, int]:
    if fold.target.rows is not None:
        return fold.target.rows
    # Stop at the adapter's own rows: one that was trained on the first rows of a vocabulary does not change later rows.
    return (0, rows) if fold.target.stacked else (0, min(rows, fold.shape[0]))


class LowRankBlocks:
    """The changes of one output tensor, as factors for the compiled loop."""

    def __init__(
        self, output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]], segments: Sequence[Segment]
    ) -> None:
        self.output, self.folds, self.segments = output, folds, segments
        self.width = math.prod(output.shape[1 + folds[0][0].target.stacked :])
        self._expert: int | None = None
        self._sums: dict[Segment, LowRankSum | None] = {}

    def add(self, raw: Numbers, out: Numbers, block: Block) -> bool:
        """Write raw and all changes of a block into `out`, rounded once; both are flat.

        Returns:
            False if the block is too small to be worth it, a change is not a low-rank product, or an element is in
            doubt; then `out` is undefined.
        """
        if block.elements < LEAST:
            return False
        if block.expert != self._expert:
            self._expert, self._sums = block.expert, {}
        given, made = cast("tuple[Array, Array]", (raw, out))
        for segment in self.segments:
            start, stop = max(segment.start, block.start), min(segment.stop, block.stop)
            if start >= stop:
                continue
            here = slice((start - block.start) * self.width, (stop - block.start) * self.width)
            if not segment.changes:
                _cast(given[here], made[here])
                continue
            change = self._sum(segment)
            kinds = self.output.source.dtype, self.output.dtype
            rows = start - segment.start, stop - segment.start
            if change is None or not change.add(given[here], made[here], kinds, *rows):
                return False
        return True

    def _sum(self, segment: Segment) -> LowRankSum | None:
        if segment not in self._sums:
            self._sums[segment] = self._joined(segment)
        return self._sums[segment]

    def _joined(self, segment: Segment) -> LowRankSum | None:
        """Return all changes of a segment as one product; None if one is not a product, or the rank is too large."""
        import numpy as np

        lefts, rights = [], []
        for fold, updates in (self.folds[position] for position in segment.changes):
            for update in updates:
                own = update if self._expert is None else update.expert(self._expert)
                pair = own.pair(fold.logical) if isinstance(own, Additive) else None
                if pair is None:
                    return None
                B, A = cast("tuple[Array, Array]", pair)
                # Transpose the product for a weight that is stored `[in, out]`.
                left, right = (B, A) if fold.axis == "out" else (A.T, B.T)
                offset = _span(fold, segment.stop)[0]
                lefts.append(fold.weight * left[segment.start - offset : segment.stop - offset])
                rights.append(right)
        if sum(len(right) for right in rights) > THIN:
            return None
        return LowRankSum(np.concatenate(lefts, axis=1), np.concatenate(rights))


def _cast(values: Array, out: Array) -> None:
    import numpy as np

    np.copyto(out, values, casting="unsafe")


# The compiled inner loop of a merge, `native/merge.c`: base + B @ A in float32 with proven bounds, rounded once.
#
# The loop gives the same bits as numpy's float64 path, two to four times as fast.


WRITTEN = ("BF16", "F16")
"""Element types that the loop writes. A float32 output needs every sum in float64, where numpy is as fast."""

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
        panels = np.zeros((rank, padded), np.float32)
        with np.errstate(over="ignore"):
            panels[:, :width] = right
            self._left = np.ascontiguousarray(left, np.float32)
        self._panels = np.ascontiguousarray(panels.reshape(rank, -1, PANEL).swapaxes(0, 1))
        self._left64, self._right64 = np.ascontiguousarray(left), np.ascontiguousarray(right.T)
        # By the Cauchy-Schwarz inequality, sum_k w_k |b_k| |a_k| is at most the product of two norms, weighted by w.
        weights = np.sqrt(_roundings(rank))
        rows, columns = _norms(left * weights), _norms(right.T * weights)
        self._row_bound = _upwards(rows, 2.0**-24)
        self._column_bound = np.zeros(padded, np.float32)
        self._column_bound[:width] = _upwards(columns, 1.0)
        self._row_norm = np.where(rows == 0, 0.0, rows + 2.0**-300) * ((rank + 4) * 2.0**-51)
        self._column_norm = np.where(columns == 0, 0.0, columns + 2.0**-300)

    def add(self, raw: Array, out: Array, kinds: tuple[DType, DType], start: int, stop: int) -> bool:
        """Write raw + rows `start` to `stop` of the change into `out`, rounded once; both are flat.

        Returns:
            False if float64 could not settle every element, so that numpy must compute the block; then `out` is
            undefined.
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
        return open_ == 0


def _roundings(rank: int) -> Array:
    """Return an upper bound for the number of float32 roundings of each product b_k a_k in an element.

    Both factors are rounded, and so is their product, unless it is added in the same step. Then come the sums: with the
    later products in its chunk of 16, and with the chunks from its own on. One more rounding covers two small errors:
    numpy's float64 sum, whose roundings are 2**-29 times as large, and the squares of all these errors.
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
