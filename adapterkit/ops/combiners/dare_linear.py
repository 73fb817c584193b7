"""DARE: drop entries of each change at random, scale up the rest to keep the expected value, and sum the changes.

Yu et al. 2023, https://arxiv.org/abs/2311.03099. A single tuned model keeps its abilities even if nine tenths of the
entries are dropped. For merging, the README of https://github.com/yule-BUAA/MergeLM drops a fifth of the entries, which
is also the default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import RESCALE, RESCALES, Chance, Sparse

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Mask


class Dare(Sparse):
    """lambda * sum_t w_t m_t D_t / p, where each entry of m_t is 1 with probability p, else 0."""

    title = "DARE, then task arithmetic"
    paper = "https://arxiv.org/abs/2311.03099"
    depends: ClassVar = frozenset({"order", "seed"})
    single = frozenset({"density"})
    compat: ClassVar = {"mergekit": {"density": 1.0, "rescale": "norm"}, "peft": {}}

    density: float = parameter(0.8, "probability p that an entry is kept", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        return drawn(at.each(self, "density"), at)

    def chances(self, at: FormulaContext) -> Sequence[Chance | None]:
        return chances(at.each(self, "density"))


def drawn(densities: Sequence[float], at: FormulaContext) -> Mask:
    """Return a function that draws the mask of entries to keep.

    An adapter's density is the probability that an entry of its change is kept.
    """
    import numpy as np

    if min(densities) >= 1:
        return lambda *_: (None, 1.0)
    chance = np.minimum(np.reshape(densities, (-1, 1, 1)), 1.0)

    def mask(changes: Array, rows: slice) -> tuple[Array, Array]:
        shape, first = changes.shape[1:], rows.start * changes.shape[2]
        kept = np.empty(changes.shape, bool)
        for t, density in enumerate(densities):
            kept[t] = True if density >= 1 else at.uniform(t, shape, first) < density
        return kept, chance

    return mask


def chances(densities: Sequence[float]) -> list[Chance | None]:
    """Return each adapter's `Chance` for the compiled loop; None if all entries of its change are kept."""
    return [None if density >= 1 else Chance(density) for density in densities]
