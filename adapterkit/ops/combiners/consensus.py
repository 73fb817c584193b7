"""Consensus task arithmetic: sum the changes, and keep the entries that are important for several tasks (TALL masks).

m_t = [|D_t| >= lambda_t |sum D - D_t|]; D = scale * (sum D) * [sum_t m_t >= agree]. Wang et al. 2024,
https://arxiv.org/abs/2405.07813. The authors choose lambda_t between 0.2 and 0.6 on validation data; the default here
is 0.4. Two tasks must agree by default, as in https://github.com/nik-dim/tall_masks.
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
    """The sum of the changes, without entries that are important for fewer than `agree` tasks."""

    title = "Consensus task arithmetic (TALL masks)"
    paper = "https://arxiv.org/abs/2405.07813"
    single = frozenset({"threshold"})

    threshold: float = parameter(
        0.4, "lambda_t: an entry is important if |D_t| is at least lambda_t times |sum of the other changes|", least=0
    )
    agree: int = parameter(2, "an entry is kept if it is important for at least this many tasks", least=1)

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        levels = np.reshape(at.each(self, "threshold"), (-1, 1, 1))

        def formula(changes: Array, _: slice) -> Array:
            changes *= weights[:, None, None]
            total = changes.sum(0)
            matter = (np.abs(changes) >= levels * np.abs(total - changes)).sum(0)
            # If fewer than `agree` adapters change this target, a kept entry must be important for all of them.
            kept: Array = self.scale * total * (matter >= min(self.agree, len(changes)))
            return kept

        return formula
