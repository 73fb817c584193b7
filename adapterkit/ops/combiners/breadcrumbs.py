"""Model Breadcrumbs: drop the largest and smallest entries of each change, and sum the other entries.

With a sign election, only entries with the elected sign are summed.

Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795: in each layer, the entries whose magnitudes lie between
the quantiles 0.85 and 0.993 are kept. The authors' code, https://github.com/rezazzr/breadcrumbs, takes the quantiles of
each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import DENSITY, RESCALE, Sparse, ranks

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Mask


SCOPE = (
    "whether density and gamma are shares of the entries of a tensor, as in the paper (tensor), "
    "or of the entries of each row, as in the authors' code (row)"
)


class Breadcrumbs(Sparse):
    """lambda * sum_t w_t m_t D_t, where the mask m_t is 1 for the entries that change t keeps, else 0.

    The mask drops the `gamma * n` largest of n entries, keeps the `density * n` next largest entries, and drops the
    rest. If `density` is 1, the mask keeps all entries.
    """

    title = "Model Breadcrumbs"
    paper = "https://arxiv.org/abs/2312.06795"
    single = frozenset({"density", "gamma"})
    compat: ClassVar = {"mergekit": {"density": 1.0, "gamma": 0.01, "weighted_vote": True}}

    density: float = parameter(0.143, DENSITY, least=0, most=1)
    gamma: float = parameter(0.007, "share of the entries to drop, largest magnitudes first", least=0, most=1)
    scope: str = parameter("tensor", SCOPE, among=("tensor", "row"))
    rescale: str = parameter("none", RESCALE, among=("none", "norm"))

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        import numpy as np

        settings = list(zip(at.each(self, "density"), at.each(self, "gamma"), strict=True))
        if min(density for density, _ in settings) >= 1:
            return lambda *_: (None, 1.0)
        spans = [_places(*each, blocks.size if self.scope == "tensor" else blocks.shape[1]) for each in settings]
        if self.scope == "row":
            first, last = (np.reshape(ends, (-1, 1, 1)) for ends in zip(*spans, strict=True))

            def of_rows(changes: Array, _: slice) -> tuple[Array, float]:
                place = np.stack([ranks(each) for each in np.abs(changes)])
                return (place >= first) & (place < last), 1.0

            return of_rows
        between = _Between(blocks, spans)
        return lambda changes, rows: (between(np.abs(changes), rows), 1.0)


def _places(density: float, gamma: float, count: int) -> tuple[int, int]:
    """Return the range `(first, end)` of the positions to keep among `count` magnitudes in ascending order."""
    if density >= 1:
        return 0, count
    kept = int(density * count)
    first = max(count - kept - int(gamma * count), 0)
    return first, first + kept


class _Between:
    """A function that returns a mask of the kept entries of a block.

    `spans` has a pair `(first, end)` for each change. An entry is kept if its position in the ascending order of the
    change's magnitudes is at least `first` and less than `end`. Equal magnitudes are ordered by their position in the
    tensor. In each pass, the function must be called with the blocks in order.
    """

    def __init__(self, blocks: Blocks, spans: Sequence[tuple[int, int]]) -> None:
        import numpy as np

        size = blocks.size
        # A span counts positions from the smallest magnitude, but `select` counts k from the largest, so convert each
        # position to k. A position is outside the tensor only if no entry is kept. Clamp such a position; the magnitude
        # that `select` returns for it is not used.
        wanted = [
            lambda total, _, place=place: total - place
            for first, last in spans
            for place in (min(first, size - 1), max(last - 1, 0))
        ]
        selections = blocks.select(np.abs, wanted, each=2)
        self.spans = list(spans)
        self.ends = [(selections[2 * t], selections[2 * t + 1]) for t in range(len(spans))]
        # Several entries may have the same magnitude as the first or the last kept entry. Rank these entries by
        # position, over all blocks in order, so that exactly the requested number of entries is kept.
        self.seen = [[0, 0] for _ in spans]

    def __call__(self, sizes: Array, rows: slice) -> Array:
        import numpy as np

        kept = np.empty(sizes.shape, bool)
        for t, ((first, last), (low, high)) in enumerate(zip(self.spans, self.ends, strict=True)):
            if rows.start == 0:
                self.seen[t] = [0, 0]
            if last <= first:
                kept[t] = False
                continue
            kept[t] = (sizes[t] > low.value) & (sizes[t] < high.value)
            for number, end in enumerate((low, high) if low.value < high.value else (low,)):
                equal = (sizes[t] == end.value).reshape(-1)
                if equal.any():
                    smaller = end.total - end.above - end.equal
                    place = smaller + self.seen[t][number] + equal.cumsum() - 1
                    self.seen[t][number] += int(np.count_nonzero(equal))
                    kept[t] |= (equal & (place >= first) & (place < last)).reshape(kept[t].shape)
        return kept
