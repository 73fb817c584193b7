"""Iso-C: set all singular values of the sum of the changes to their mean.

Marczak et al. 2025, https://arxiv.org/abs/2502.04959. The paper https://arxiv.org/abs/2509.17786 applies Iso-C in the
space that the adapters span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Spectral, leading, parameter
from ._entrywise import Scaled

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext

OVER = "divide the sum of the singular values by the summed change's rank (core) or by min(out, in * k) (weight)"


class IsoC(Scaled, Spectral):
    """scale * mean(S) * U V^T, where U S V^T is the SVD of the sum of the changes."""

    title = "Isotropic merging in the common space (Iso-C)"
    paper = "https://arxiv.org/abs/2502.04959"

    over: str = parameter("core", OVER, among=("core", "weight"))

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        U, S, Vh = leading(np.tensordot(weights, cores, 1))
        result: Array = self.scale * S.sum() / max(self._count(len(S), at), 1) * (U @ Vh)
        return result

    def _count(self, rank: int, at: FormulaContext) -> int:
        import math

        return rank if self.over == "core" else min(at.shape[0], math.prod(at.shape[1:]))
