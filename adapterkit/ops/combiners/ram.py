"""Reinforced agent merging: keep entries that only one task changed, and average entries that several tasks changed.

An entry counts as changed if its magnitude is above epsilon. Reinforcement learning changes few entries of a weight,
but products of low-rank factors change nearly all entries. Yuan et al. 2026, https://arxiv.org/abs/2601.13572; epsilon
is `threshold` of https://github.com/xiangchi-yuan/mrl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula

EPSILON = "an entry counts as changed if its magnitude is above epsilon"


class RAM(Entrywise):
    """lambda * sum_t w_t m_t D_t / sum_t m_t with m_t = [|D_t| > epsilon]."""

    title = "Reinforced agent merging (RAM)"
    paper = "https://arxiv.org/abs/2601.13572"
    depends: ClassVar = frozenset({"size"})
    compat: ClassVar = {"mergekit": {}}

    epsilon: float = parameter(1e-5, EPSILON, least=0)

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        def formula(changes: Array, _: slice) -> Array:
            changed = np.abs(changes) > self.epsilon
            total = np.tensordot(weights, changes * changed, 1)
            result: Array = self.scale * total / np.maximum(changed.sum(0), 1)
            return result

        return formula
