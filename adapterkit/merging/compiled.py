"""Prepare a tensor's changes for the compiled loops, which compute low-rank products and DoRA on numpy arrays.

Adapters often change only parts of a tensor, such as q, k and v in one fused weight. So the rows are cut into segments
in which the same updates apply, and the factors of all updates in a segment are joined into one product. A segment with
a DoRA has no other update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from ..core.updates import Additive, Update, WeightUpdate
from .kernel import LEAST, LowRankSum, NormalizedSum, takes

if TYPE_CHECKING:
    from ..io.lazy import Array
    from ..linalg.namespace import Numbers
    from .blocks import Block
    from .planned import Output
    from .planned_update import PlannedUpdate

THIN = 256
"""The largest rank of joined factors."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a stored tensor (or of each expert), and the indices of the planned updates that change these rows."""

    start: int
    stop: int
    changes: tuple[int, ...]


def lowrank_blocks(output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]]) -> LowRankBlocks | None:
    """Return an output's changes for the compiled loops; None if the loops do not support the dtypes or the changes.

    Args:
        output: the output tensor.
        folds: the planned updates of the output, with loaded updates as numpy arrays.
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
    """Whether a change is a sum of low-rank products whose rows are rows of the stored tensor."""
    if not fold.additive or fold.bias or fold.target.stacked != stacked:
        return False
    if fold.axis == "out":
        return True
    # Refuse a target with rows if they are columns of this tensor, and a target with a kernel, whose axes are not in
    # the rows.
    return fold.target.rows is None and len(shape) == 2 + stacked


def _is_normalizing(fold: PlannedUpdate, updates: list[Update], stacked: bool) -> bool:
    """Whether an update with weight 1 scales the rows of the stored tensor to a magnitude, as DoRA does."""
    if len(updates) != 1 or fold.weight != 1 or fold.bias or fold.target.stacked != stacked or fold.axis != "out":
        return False
    own = updates[0]
    return isinstance(own, WeightUpdate) and type(own).normalized is not WeightUpdate.normalized


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
    # Stop at the last row that the adapter was trained on, because it may have been trained on the first rows of a
    # vocabulary.
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
        """Write a block of the merged tensor into `out`, rounded once; `raw` is the base's block.

        Both arrays are flat.

        Returns:
            The squared norms of the changes that depend on the base, by index of the planned update. None, with `out`
            undefined, if the block is too small for a call to pay off, if the loops cannot compute a change, or if the
            rounding of an element is uncertain.
        """
        if block.elements < LEAST:
            return None
        norms: dict[int, float] = {}
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
            norm = None if change is None else change.write(given[here], made[here], kinds, *rows)
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
        own = update if self._expert is None else update.expert(self._expert)
        parts = own.normalized() if isinstance(own, WeightUpdate) else None
        if parts is None:
            return None
        magnitude, B, A = cast("tuple[Array, Array, Array]", parts)
        offset = _span(fold, segment.stop)[0]
        rows = slice(segment.start - offset, segment.stop - offset)
        return NormalizedSum(magnitude[rows], B[rows], A)

    def _joined(self, segment: Segment) -> LowRankSum | None:
        """Join all changes of a segment into one product.

        Return None if a change is not a product, or the rank is too large.
        """
        import numpy as np

        lefts, rights = [], []
        for fold, updates in (self.folds[position] for position in segment.changes):
            for update in updates:
                own = update if self._expert is None else update.expert(self._expert)
                pair = own.pair(fold.logical) if isinstance(own, Additive) else None
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


def _cast(values: Array, out: Array) -> None:
    import numpy as np

    np.copyto(out, values, casting="unsafe")
