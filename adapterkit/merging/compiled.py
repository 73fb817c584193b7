"""Prepare blocks of a tensor for the compiled loops, which compute low-rank products and DoRA on numpy arrays.

Adapters often change only parts of a tensor, such as q, k and v in one fused weight. The rows are cut into segments
with the same changes, and the factors of all changes in a segment are joined into one product. A segment with a DoRA
has no other change.
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
    normalizing = [_is_normalizing(fold, updates, stacked) for fold, updates in folds]
    if not all(norm or _is_sum(fold, shape, stacked) for norm, (fold, _) in zip(normalizing, folds, strict=True)):
        return None
    segments = _segments([fold for fold, _ in folds], shape[int(stacked)])
    if any(len(each.changes) > 1 and any(normalizing[position] for position in each.changes) for each in segments):
        return None
    return LowRankBlocks(output, folds, segments)


def _is_sum(fold: PlannedUpdate, shape: tuple[int, ...], stacked: bool) -> bool:
    """Whether a change is a sum of products whose rows are rows of the stored tensor."""
    if not fold.additive or fold.bias or fold.target.stacked != stacked:
        return False
    if fold.axis == "out":
        return True
    # Refuse a target with rows, which are columns of this tensor, and a target with a kernel, whose axes are not in the
    # rows.
    return fold.target.rows is None and len(shape) == 2 + stacked


def _is_normalizing(fold: PlannedUpdate, updates: list[Update], stacked: bool) -> bool:
    """Whether an update scales the rows of the stored tensor to a magnitude, as DoRA does, at full weight."""
    if len(updates) != 1 or fold.weight != 1 or fold.bias or fold.target.stacked != stacked or fold.axis != "out":
        return False
    own = updates[0]
    return isinstance(own, WeightUpdate) and type(own).normalized is not WeightUpdate.normalized


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
    # Stop at the rows that the adapter was trained on: these may be only the first rows of a vocabulary.
    return (0, rows) if fold.target.stacked else (0, min(rows, fold.shape[0]))


class LowRankBlocks:
    """The changes of one output tensor, as factors for the compiled loop."""

    def __init__(
        self, output: Output, folds: Sequence[tuple[PlannedUpdate, list[Update]]], segments: Sequence[Segment]
    ) -> None:
        self.output, self.folds, self.segments = output, folds, segments
        self.width = math.prod(output.shape[1 + folds[0][0].target.stacked :])
        self._expert: int | None = None
        self._sums: dict[Segment, LowRankSum | NormalizedSum | None] = {}

    def write(self, raw: Numbers, out: Numbers, block: Block) -> dict[int, float] | None:
        """Write a block with all its changes into `out`, rounded once; `raw` is the base; both are flat.

        Returns:
            The squared norms of the changes that depend on the base, by index of the planned update. None if the block
            is too small to be worth it, the loops cannot compute a change, or the rounding of an element is uncertain;
            then `out` is undefined.
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
        """Return the update of a segment that scales its rows to a magnitude; None if its changes are sums."""
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
