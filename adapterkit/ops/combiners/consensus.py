"""Consensus task arithmetic: entries of the sum are kept where they matter to enough of the tasks (TALL masks).

m_t = [|D_t| >= lambda_t |sum D - D_t|];  D = scale * (sum D) * [sum_t m_t >= agree].
Wang et al. 2024, https://arxiv.org/abs/2405.07813. Its authors choose lambda_t from 0.2 to 0.6 by validation, two tasks
that agree being the default of https://github.com/nik-dim/tall_masks; without data it is the middle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import parameter
from ._entrywise import Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula


class Consensus(Entrywise):
    """The sum of the changes without entries of interest to one task alone, or to none."""

    title = "Consensus task arithmetic (TALL masks)"
    paper = "https://arxiv.org/abs/2405.07813"
    single = frozenset({"threshold"})

    threshold: float = parameter(0.4, "lambda_t: how large an entry is beside what the others add", least=0)
    agree: int = parameter(2, "tasks that an entry must matter to", least=1)

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        levels = np.reshape(at.each(self, "threshold"), (-1, 1, 1))

        def formula(changes: Array, _: slice) -> Array:
            changes *= weights[:, None, None]
            total = changes.sum(0)
            matter = (np.abs(changes) >= levels * np.abs(total - changes)).sum(0)
            # If fewer adapters change this target than must agree, all of them must.
            kept: Array = self.scale * total * (matter >= min(self.agree, len(changes)))
            return kept

        return formula
