"""DARE and TIES: drop entries at random, scale up the other entries, elect signs, and average the entries that agree.

Yu et al. 2023, https://arxiv.org/abs/2311.03099. A single tuned model keeps its abilities even if nine tenths of the
entries are dropped. For merging, the README of https://github.com/yule-BUAA/MergeLM drops a fifth of the entries, which
is also the default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..blocks import Selection, settle
from ._combiner import parameter
from ._entrywise import (
    DENOMINATOR,
    DENOMINATORS,
    RESCALE,
    RESCALES,
    SIGN,
    SIGNS,
    ZERO_SIGN,
    ZERO_SIGNS,
    Sparse,
    count_of,
)
from .dare_linear import chances, drawn

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Chance, Mask


TRIM = "share of a tensor's entries to keep after the random drop (the largest are kept); MergeLM uses 0.2"


class DareTIES(Sparse):
    """lambda * the mean of the entries of m_t D_t / p with the elected sign.

    Each entry of the mask m_t is 1 with probability p, else 0.
    """

    title = "DARE, then TIES"
    paper = "https://arxiv.org/abs/2311.03099"
    depends: ClassVar = frozenset({"order", "seed"})
    single = frozenset({"density"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "rescale": "norm", "weighted_vote": True, "zero_sign": "+", "denominator": "none",
        },
        "peft": {"zero_sign": "+"},
    }  # fmt: skip

    trim: float = parameter(1.0, TRIM, least=0, most=1)
    density: float = parameter(0.8, "probability p that an entry is kept", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)
    sign: str = parameter("total", SIGN, among=SIGNS)
    zero_sign: str = parameter("majority", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("count", DENOMINATOR, among=DENOMINATORS)

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        import numpy as np

        chance = drawn(at.each(self, "density"), at)
        if self.trim >= 1:
            return chance
        # `Blocks.select` cannot be used here, because the random mask depends on the positions of entries. `select`
        # does not pass positions to its `key` function.
        selections = [Selection(lambda total, _: count_of(self.trim, total, "reference")) for _ in at.present]

        def once() -> None:
            for rows, changes in blocks:
                kept, _ = chance(changes, rows)
                changes *= 1.0 if kept is None else kept
                for selection, D in zip(selections, np.abs(changes), strict=True):
                    if selection.selected is None:
                        selection.feed(D.reshape(-1))

        settle(selections, once)
        least = np.reshape([each.selected.value for each in selections if each.selected], (-1, 1, 1))

        def mask(changes: Array, rows: slice) -> tuple[Array, Array | float]:
            kept, probability = chance(changes, rows)
            largest = np.abs(changes) >= least
            return largest if kept is None else kept & largest, probability

        return mask

    def chances(self, at: FormulaContext) -> Sequence[Chance | None] | None:
        return chances(at.each(self, "density")) if self.trim >= 1 else None
