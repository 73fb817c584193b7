"""Singular value calibration: in a merged change, scale down the singular values to which several tasks contribute.

D = U S V^T is the merged change of T tasks, u_r is a column of U, and s_r^t = <u_r^T D, u_r^T D_t> / |u_r^T D_t|^2. The
singular value of u_r is multiplied by T / sum_t max(alpha, s_r^t). Paper (2026): https://arxiv.org/abs/2602.05536. If
the tasks have no common directions, alpha = 1 leaves the sum of their changes unchanged. The code in
https://github.com/tanganke/fusion_bench sets alpha to 0.1 if the merged change comes from a sum, TIES, DARE or Iso-C.
It sets alpha to 0.2 for Iso-CTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import PlugIn, between, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta

NOISE = 1e-12
"""A task's part u_r^T D_t counts as rounding noise if its norm is below this fraction of the norm of D_t."""


class SVC(PlugIn):
    """A plug-in that scales down singular values in the result of another method."""

    title = "Singular value calibration (SVC) of another method's result"
    paper = "https://arxiv.org/abs/2602.05536"

    alpha: float = parameter(1.0, "lower limit of s_r^t, task t's contribution to direction r", least=1e-6)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowrank import whole_core
        from ._combiner import leading

        merged = self.inner.matrix(deltas, weights, at)
        # A pass that only collects statistics for the combiner `then` ignores the result. Skip the calibration there.
        if at.census.counting:
            return merged
        common = whole_core([merged, *deltas])
        D, cores = common.cores[0], weights[:, None, None] * np.stack(common.cores[1:])
        U, S, Vh = leading(D)
        replies = U.T @ cores
        squares = (replies * replies).sum(2)
        replied = squares > (NOISE * NOISE * (cores * cores).sum((1, 2)))[:, None]
        along = np.where(replied, ((U.T @ D) * replies).sum(2) / np.where(replied, squares, 1.0), 0.0)
        factors = len(deltas) / np.maximum(self.alpha, along).sum(0)
        return between(common.left, (U * (factors * S)) @ Vh, common.right)
