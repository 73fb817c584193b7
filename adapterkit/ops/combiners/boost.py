"""Subspace Boosting: raise the small singular values of another method's result.

S_1 >= S_2 >= .. are the singular values of the other method's result. k is the smallest number for which
S_1 + .. + S_k is at least beta times the sum of all singular values. All singular values after S_k are set to S_k.
Skorobogat et al. 2025, https://arxiv.org/abs/2506.16506: in many merged models, most of the change lies in few
directions. The default beta, 0.01, is from the authors' code.

Here, singular values of 0 stay 0, so that the result of low-rank changes has a low rank. The authors instead work on
full matrices, and raise all singular values after S_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import PlugIn, between, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class SubspaceBoosting(PlugIn):
    """U diag(max(S, S_k)) V^T, with U S V^T = then(D_1 .. D_T)."""

    title = "Subspace Boosting of another method's result"
    paper = "https://arxiv.org/abs/2506.16506"

    beta: float = parameter(
        0.01,
        "S_1, .., S_k add up to at least this share of the sum of all singular values; the others are raised to S_k",
        least=0,
        most=1,
    )

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowrank import whole_core
        from ._combiner import leading

        merged = self.inner.matrix(deltas, weights, at)
        # While `counting` is true, the combiner `then` only collects statistics, and its result is ignored.
        if at.census.counting:
            return merged
        common = whole_core([merged])
        U, S, Vh = leading(common.cores[0])
        if len(S):
            sums = S.cumsum()
            place = min(int(np.searchsorted(sums, self.beta * sums[-1])), len(S) - 1)
            S = np.maximum(S, S[place])
        return between(common.left, (U * S) @ Vh, common.right)
