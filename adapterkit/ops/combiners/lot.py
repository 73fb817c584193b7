"""LOT: compute the change whose outputs on each task's inputs are nearest to that task's outputs, by a pseudoinverse.

D = (sum_t w_t D_t G_t) (sum_t w_t G_t)^+ with G_t = X_t^T X_t, where X_t are the inputs of task t. Sun et al. 2025,
https://arxiv.org/abs/2505.23859, equation 9, https://github.com/SunWenJu123/model-merging. LOT is RegMean without the
factor for off-diagonal entries. In directions without any input, LOT changes nothing. For input features that are
always 0, RegMean uses the mean of the changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...linalg.namespace import summed
from ._combiner import Combiner, parameter
from .regmean import INPUTS, gram_of

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class LOT(Combiner):
    """The least-squares solution over the inputs; it has low-rank factors if all changes have low-rank factors."""

    title = "Layer-wise optimal task vectors (LOT)"
    paper = "https://arxiv.org/abs/2505.23859"
    data: ClassVar[str | None] = INPUTS
    learns: ClassVar[str | None] = "inputs"

    tolerance: float = parameter(
        1e-10, "eigenvalues below this fraction of the largest eigenvalue count as 0", least=0, most=1
    )

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta

        grams = [w * gram_of(at, t, delta.shape[1]) for t, (delta, w) in enumerate(zip(deltas, weights, strict=True))]
        # The pseudoinverse is zero in directions without inputs from any task, so these directions do not change.
        below = np.linalg.pinv(summed(grams), self.tolerance, hermitian=True)
        maps = [G @ below for G in grams]
        A = np.vstack([delta.A @ through for delta, through in zip(deltas, maps, strict=True)])
        rests = [d.rest @ through for d, through in zip(deltas, maps, strict=True) if d.rest is not None]
        return Delta(np.hstack([delta.B for delta in deltas]), A, summed(rests) if rests else None)
