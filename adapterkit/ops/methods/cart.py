"""CART: the mean, and the leading directions of how each task differs from it.

D = mean + scale * sum_t top_k(D_t - mean).  Choi et al. 2024, https://arxiv.org/abs/2412.12153
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._entrywise import SCALE
from ._method import Spectral, parameter
from ._spectra import leading

if TYPE_CHECKING:
    from ...tensors.computed import Array
    from ..at import At


class CART(Spectral):
    """Centred low-rank task vectors, added to the centre."""

    title = "Centred arithmetic with reduced-rank task vectors (CART)"
    paper = "https://arxiv.org/abs/2412.12153"

    share: float = parameter(0.08, "share of the directions that each difference keeps", least=0, most=1)
    scale: float = parameter(1.0, SCALE)

    def core(self, cores: Array, weights: Array, at: At) -> Array:
        import numpy as np

        each = weights[:, None, None] * cores
        centre = each.mean(0)
        kept = math.ceil(self.share * min(centre.shape))
        total = np.zeros_like(centre)
        for M in each:
            U, S, Vh = leading(M - centre, kept)
            total += (U * S) @ Vh
        result: Array = centre + self.scale * total
        return result
