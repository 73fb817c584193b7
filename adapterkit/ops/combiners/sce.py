"""SCE: select entries that vary most between changes, compute weights from these entries, and erase minority signs.

Wan et al. 2024 (FuseChat), https://arxiv.org/abs/2408.07990. The paper and mergekit merge only the selected entries.
The authors' code (https://github.com/fanqiwan/FuseAI, sce_merging.py) merges all entries, and uses the selection only
to compute the weights. The default share of 0.1 is from the authors' fusechat-sce.yml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import SIGN, Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula


UNSELECTED = "entries that were not selected are dropped (drop), or merged with the same weights as the others (keep)"


class SCE(Entrywise):
    """scale * sum_t w_t M_t D_t / sum_t w_t M_t, where M_t is 1 for entries with the elected sign, else 0.

    M_t is also 0 for entries that were not selected, if `unselected` is `drop`. The factor w_t is proportional to
    q_t * sum(X_t^2), where q_t is the adapter's weight, and X_t contains the selected entries of D_t.
    """

    title = "SCE"
    paper = "https://arxiv.org/abs/2408.07990"
    compat: ClassVar = {"mergekit": {"select": 1.0}}

    select: float = parameter(
        0.1, "share of the varying entries to select; the largest variances are selected", least=0, most=1
    )
    unselected: str = parameter("drop", UNSELECTED, among=("drop", "keep"))
    sign: str = parameter("total", SIGN, among=("total", "frequency"))

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        least = self._least(blocks)

        def selected(changes: Array) -> Array | float:
            return 1.0 if least is None else _spread(changes)[0] >= least

        squares = np.zeros(blocks.count)
        for _, changes in blocks:
            changes *= selected(changes)
            squares += np.einsum("tij,tij->t", changes, changes)
        squares *= weights
        total = squares.sum()
        w = squares / total if total else np.full(blocks.count, 1 / blocks.count)

        def formula(changes: Array, _: slice) -> Array:
            if self.unselected == "drop":
                changes *= selected(changes)
            votes = changes.sum(0) if self.sign == "total" else (changes > 0).sum(0) - (changes < 0).sum(0)
            elected = np.where(votes >= 0, 1.0, -1.0)
            along = changes * elected
            below = np.tensordot(w, along > 0, 1)
            result: Array = self.scale * elected * np.tensordot(w, np.maximum(along, 0.0), 1)
            return result / np.where(below == 0, 1.0, below)

        return formula

    def _least(self, blocks: Blocks) -> float | None:
        """Return the smallest variance of a selected entry, or None if all entries are selected."""
        if self.select >= 1 or blocks.count == 1:
            return None
        return blocks.select(_spread, [lambda _, varying: int(self.select * varying)])[0].value


def _spread(changes: Array) -> Array:
    """Return the variance of each entry over the changes, `[1, ...]`."""
    import numpy as np

    apart = changes - changes.mean(0)
    spread: Array = np.einsum("t...,t...->...", apart, apart)[None] / (len(changes) - 1)
    return spread
