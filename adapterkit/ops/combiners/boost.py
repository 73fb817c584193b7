"""Subspace Boosting: raise the small singular values of another method's result to a larger one.

S_k is the first singular value at which the sum S_1 + .. + S_k reaches the share beta of the sum of all; smaller values
are set to S_k.  Skorobogat et al. 2025, https://arxiv.org/abs/2506.16506: in many merged models, few directions hold
most of the change. beta = 0.01 as in the authors' code. Directions with a singular value of 0 are not raised: the
result of low-rank changes keeps their rank, while in the authors' full matrices all directions of the weight are
raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._changes import between
from ._combiner import PlugIn, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class SubspaceBoosting(PlugIn):
    """U diag(max(S, S_k)) V^T, with U S V^T = then(D_1 .. D_T)."""

    title = "Subspace Boosting of another method's result"
    paper = "https://arxiv.org/abs/2506.16506"

    beta: float = parameter(
        0.01, "share of the sum of singular values that ends with the smallest value kept", least=0, most=1
    )

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowrank import whole_core
        from ._spectra import leading

        merged = self.inner.matrix(deltas, weights, at)
        # The pass only feeds the census of the inner combiner; its results are ignored.
        if at.census.counting:
            return merged
        common = whole_core([merged])
        U, S, Vh = leading(common.cores[0])
        if len(S):
            sums = S.cumsum()
            place = min(int(np.searchsorted(sums, self.beta * sums[-1])), len(S) - 1)
            S = np.maximum(S, S[place])
        return between(common.left, (U * S) @ Vh, common.right)
