"""Reinforced agent merging plus (RAM+): scale up the entries that only one task changed.

Entries that only task t changed are multiplied by 1 + r clip(rho_t, 0, alpha). rho_t is the number of entries that both
task t and other tasks changed, divided by the number of entries that only task t changed. Yuan et al. 2026,
https://arxiv.org/abs/2601.13572. The default r and alpha are from https://github.com/xiangchi-yuan/mrl. That code
counts entries over the whole model. This module and mergekit count in each tensor; mergekit's defaults for r and alpha
are 0.1 and 0.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import Entrywise
from .ram import EPSILON

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula


class RAMPlus(Entrywise):
    """lambda * sum_t w_t m_t D_t f_t; f_t is 1 / n for entries that n > 1 tasks changed, else task t's factor."""

    title = "Reinforced agent merging plus (RAM+), tensor by tensor"
    paper = "https://arxiv.org/abs/2601.13572"
    depends: ClassVar = frozenset({"size"})
    compat: ClassVar = {"mergekit": {"r": 0.1, "alpha": 0.2}}

    r: float = parameter(0.05, "entries that only one task changed are multiplied by 1 + r * rho", least=0)
    alpha: float = parameter(
        1.0, "upper limit of rho = (entries shared with other tasks) / (entries that only this task changed)", least=0
    )
    epsilon: float = parameter(1e-5, EPSILON, least=0)

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        unique_factors = self._factors(blocks)[:, None, None]

        def formula(changes: Array, _: slice) -> Array:
            changed = np.abs(changes) > self.epsilon
            tasks = changed.sum(0)
            changes *= changed
            changes *= np.where(tasks > 1, 1 / np.maximum(tasks, 1), unique_factors)
            result: Array = self.scale * np.tensordot(weights, changes, 1)
            return result

        return formula

    def _factors(self, blocks: Blocks) -> Array:
        """Return each task's factor for entries that only this task changed, `[T]`."""
        import numpy as np

        shared, unique = np.zeros(blocks.count, int), np.zeros(blocks.count, int)
        for _, changes in blocks:
            changed = np.abs(changes) > self.epsilon
            tasks = changed.sum(0)
            shared += (changed & (tasks > 1)).sum((1, 2))
            unique += (changed & (tasks == 1)).sum((1, 2))
        factors: Array = 1 + self.r * np.clip(shared / np.maximum(unique, 1), 0, self.alpha)
        return factors
