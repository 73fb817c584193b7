"""WUDI: the change that disturbs the tasks least, min_D sum_t |(D - D_t) D_t^T|^2 / |D_t|^2, solved exactly.

With G_t = D_t^T D_t / |D_t|^2 the minima are D sum_t G_t = sum_t D_t G_t; of these, the one nearest to the sum of the
changes, where the paper's descent starts and ends.  Cheng et al. 2025, https://arxiv.org/abs/2503.08099
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._entrywise import SCALE
from ._method import Spectral, parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class WUDI(Spectral):
    """The minimum of interference nearest to the sum."""

    title = "Least interference (WUDI)"
    paper = "https://arxiv.org/abs/2503.08099"

    scale: float = parameter(1.0, SCALE)
    tolerance: float = parameter(1e-10, "eigenvalues below this part of the largest are none", least=0, most=1)

    def core(self, cores: Array, weights: Array, at: At) -> Array:
        import numpy as np

        each = weights[:, None, None] * cores
        sizes = (each * each).sum((1, 2))
        grams = np.stack([M.T @ M / size if size else 0 * (M.T @ M) for M, size in zip(each, sizes, strict=True)])
        start, G = each.sum(0), grams.sum(0)
        pull = (each @ grams).sum(0) - start @ G
        result: Array = self.scale * (start + pull @ np.linalg.pinv(G, self.tolerance, hermitian=True))
        return result
