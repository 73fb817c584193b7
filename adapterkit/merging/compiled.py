"""Blocks of a tensor for the compiled loop, whose changes are all low-rank products of numpy arrays.

Adapters often change only parts of a tensor, such as q, k and v in one fused weight. The rows are cut into segments
with the same changes, and the factors of all changes in a segment are joined into one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from ..core.updates import Additive, Update
from .kernel import LEAST, LowRankSum, takes

if TYPE_CHECKING:
    from ..io.lazy import Array
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
