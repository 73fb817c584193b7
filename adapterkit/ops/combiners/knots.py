"""KnOTS: another method on aligned coordinates, [D_1 .. D_T] = U [S V_1 .. S V_T], one U for all tasks.

Stoica et al. 2024, https://arxiv.org/abs/2410.19735. By QR of the factors: none of the weight's size. S stands with V,
and entries of all targets compete, as in https://github.com/gstoica27/KnOTS (`s_on_V`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._changes import whole
from ._combiner import PlugIn
from ._spectra import leading

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class KnOTS(PlugIn):
    """U then(S V_1, .., S V_T)."""

    title = "KnOTS, with another method on aligned coordinates"
    paper = "https://arxiv.org/abs/2410.19735"
    then: str = "ties"

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta
        from ..lowrank import whole_core

        common = whole_core(deltas)
        U = leading(np.hstack(common.cores))[0]
        if all(delta.rest is None for delta in deltas):
            # As products of rank r, which are formed a few rows at a time: an eighth of the work for eight tasks.
            project = (common.left @ U).T
            aligned = [Delta(project @ delta.B, delta.A) for delta in deltas]
        else:
            aligned = [whole((U.T @ M) @ common.right) for M in common.cores]
        return Delta(common.left @ U, self.inner.matrix(aligned, weights, at).dense())
