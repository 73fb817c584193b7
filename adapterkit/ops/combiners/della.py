"""DELLA: drop entries at random, with a higher probability for the smaller entries of a row; then elect signs.

The result is the average of the remaining entries that have the elected sign. Deep et al. 2024,
https://arxiv.org/abs/2406.11617. The defaults follow https://github.com/declare-lab/della. Its README drops 0.3 of the
entries with a window of 0.14, and its code sets `epsilon = window_size / 2`. As in the authors' code, both the election
and the mean use weighted changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import parameter
from ._entrywise import DENOMINATOR, DENOMINATORS, RESCALE, RESCALES, SIGN, SIGNS, WEIGHTED_VOTE, Chance, Sparse, ranks

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Mask


class Della(Sparse):
    """DARE, then TIES; the probability p that an entry is kept depends on the rank of its magnitude in its row.

    p is `density - epsilon` for a row's smallest entry, and `density + epsilon` for its largest entry.
    """

    title = "DELLA"
    paper = "https://arxiv.org/abs/2406.11617"
    depends: ClassVar = frozenset({"order", "seed"})
    single = frozenset({"density", "epsilon"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "epsilon": 0.15, "rescale": "norm", "weighted_vote": True, "zero_sign": "+",
            "denominator": "weights",
        },
    }  # fmt: skip

    density: float = parameter(0.7, "mean probability that an entry is kept", least=0, most=1)
    epsilon: float = parameter(0.07, "largest difference between an entry's probability and density", least=0, most=1)
    rescale: str = parameter("inverse", RESCALE, among=RESCALES)
    sign: str = parameter("total", SIGN, among=SIGNS)
    weighted_vote: bool = parameter(True, WEIGHTED_VOTE)
    denominator: str = parameter("weights", DENOMINATOR, among=DENOMINATORS)

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        import numpy as np

        settings = list(zip(at.each(self, "density"), at.each(self, "epsilon"), strict=True))
        for density, epsilon in settings:
            if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                why = f"density {density} and epsilon {epsilon} give probabilities that are not between 0 and 1"
                raise UsageError(why, where="epsilon", cure="Choose an epsilon below both density and 1 - density")

        # The compiled loop does not call `mask`. The loop draws the same masks from the result of `self.chances`.
        def mask(changes: Array, rows: slice) -> tuple[Array, Array]:
            _, count, columns = changes.shape
            kept, chance = np.ones(changes.shape, bool), np.ones(changes.shape)
            for t, (density, epsilon) in enumerate(settings):
                if density < 1:
                    chance[t] = ranks(np.abs(changes[t]))
                    chance[t] *= 2 * epsilon / max(columns - 1, 1)
                    chance[t] += density - epsilon
                    # Entry i of a flattened tensor uses random number i. Start at the index of the block's first entry,
                    # so that the result does not depend on the sizes of blocks.
                    kept[t] = at.uniform(t, (count, columns), rows.start * columns) < chance[t]
            return kept, chance

        return mask

    def chances(self, at: FormulaContext) -> Sequence[Chance | None]:
        settings = zip(at.each(self, "density"), at.each(self, "epsilon"), strict=True)
        return [Chance(density - epsilon, 2 * epsilon) if density < 1 else None for density, epsilon in settings]
