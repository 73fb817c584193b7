"""Magnitude pruning: drop the smallest entries of each change, and sum the rest.

Han et al. 2015, https://arxiv.org/abs/1506.02626. Applied to task vectors, the method is TIES without the sign
election.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import COUNTS, DENSITY, KEPT, Sparse, thresholds

if TYPE_CHECKING:
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Mask


class MagnitudePrune(Sparse):
    """lambda * sum_t w_t top(D_t), where top keeps the largest entries."""

    title = "Magnitude pruning"
    paper = "https://arxiv.org/abs/1506.02626"
    single = frozenset({"density"})
    compat: ClassVar = {"peft": {"kept": "floor"}}

    density: float = parameter(0.5, DENSITY, least=0, most=1)
    kept: str = parameter("floor", KEPT, among=COUNTS)

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        import numpy as np

        least = thresholds(blocks, at.each(self, "density"), self.kept)
        return lambda changes, _: (np.abs(changes) >= least, 1.0)
