"""KnOTS: decompose [D_1 .. D_T] = U S [V_1 .. V_T], and apply another method to S V_1, .., S V_T.

All tasks share U. Stoica et al. 2024, https://arxiv.org/abs/2410.19735. A QR decomposition of the factors avoids
matrices of the weight's size. As in https://github.com/gstoica27/KnOTS (`s_on_V`), S is multiplied into V, and TIES
trims the entries of all targets together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import PlugIn, leading, whole

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class KnOTS(PlugIn):
    """U then(S V_1, .., S V_T), where `then` is the other method."""

    title = "KnOTS, with another method on aligned coordinates"
    paper = "https://arxiv.org/abs/2410.19735"
    then: str = "ties"

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta
        from ..lowrank import images, orthonormal, spans, triangle, whole_core

        if any(delta.rest is not None for delta in deltas):
            common = whole_core(deltas)
            U = leading(np.hstack(common.cores))[0]
            aligned = [whole((U.T @ M) @ common.right) for M in common.cores]
            return Delta(common.left @ U, self.inner.matrix(aligned, weights, at).dense())
        B = np.hstack([delta.B for delta in deltas])
        # Passes that only collect statistics do not need `left`, which has as many rows as the weight.
        left, R = (None, triangle(B)) if at.census.counting else orthonormal(B)
        U = leading(images(deltas, R))[0]
        # Keep each S V_t as a product of two factors, so that only the needed rows are computed. The two factors have
        # the rank of adapter t. If their rank were the sum of all adapters' ranks, eight adapters would take eight
        # times the work.
        aligned = [Delta(U.T @ R[:, span], delta.A) for span, delta in zip(spans(deltas), deltas, strict=True)]
        merged = self.inner.matrix(aligned, weights, at)
        return merged if left is None else Delta(left @ U, merged.dense())
