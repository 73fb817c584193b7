"""Iso-CTS: combine common directions of the sum with each task's own, orthonormal, with one singular value for all.

The first k of R directions are those of the sum; each task adds (R - k) / T directions of its remainder outside these.
Marczak et al. 2025, https://arxiv.org/abs/2502.04959; k / R = 0.8 as in https://github.com/danielm1405/iso-merging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Spectral, parameter
from ._entrywise import SCALE
from ._spectra import joined, leading

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


class IsoCTS(Spectral):
    """scale * mean(S) * polar(U) polar(V)^T over common and task-specific directions."""

    title = "Isotropic merging with task-specific directions (Iso-CTS)"
    paper = "https://arxiv.org/abs/2502.04959"

    common: float = parameter(0.8, "share of the directions that come from the sum", least=0, most=1)
    scale: float = parameter(1.0, SCALE)

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:

        each = weights[:, None, None] * cores
        U, S, Vh = leading(each.sum(0))
        own = round((len(S) - int(len(S) * self.common)) / len(each))
        kept = max(len(S) - own * len(each), 0)
        U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
        parts = [leading(M - U @ (U.T @ M), own) for M in each if own]
        U, S, Vh = joined([(U, S, Vh), *parts])
        return self.scale * (S.mean() if len(S) else 0.0) * (U @ Vh)
