"""Iso-CTS: orthonormalize directions of the summed change and of each task's change; give all the same singular value.

R is the rank of the sum of the changes. The first k directions come from this sum. Each of the T tasks adds (R - k) / T
directions of its own change, after the k common directions have been projected out. Marczak et al. 2025,
https://arxiv.org/abs/2502.04959; the default of k / R, 0.8, is from https://github.com/danielm1405/iso-merging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Spectral, joined, leading, parameter
from ._entrywise import Scaled

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


class IsoCTS(Scaled, Spectral):
    """scale * mean(S) * polar(U) polar(V)^T.

    The columns of U and V are the singular vectors of the common and the task-specific directions. S contains the
    singular values of these directions.
    """

    title = "Isotropic merging with task-specific directions (Iso-CTS)"
    paper = "https://arxiv.org/abs/2502.04959"

    common: float = parameter(0.8, "k / R, the share of the directions that come from the sum", least=0, most=1)

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:

        each = weights[:, None, None] * cores
        U, S, Vh = leading(each.sum(0))
        per_task = round((len(S) - int(len(S) * self.common)) / len(each))
        kept = max(len(S) - per_task * len(each), 0)
        U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
        parts = [leading(M - U @ (U.T @ M), per_task) for M in each if per_task]
        U, S, Vh = joined([(U, S, Vh), *parts])
        return self.scale * (S.mean() if len(S) else 0.0) * (U @ Vh)
