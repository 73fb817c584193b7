"""Weighted sum: D = sum_t w_t D_t, computed exactly by concatenating factors.

Sum: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089. Mean: Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import Mixture, parameter, shares

if TYPE_CHECKING:
    from ...io.computed import Array


class LinearCombiner(Mixture):
    """D = sum_t w_t D_t, divided by sum_t w_t if `normalize` is set."""

    title = "Weighted sum"
    paper = "https://arxiv.org/abs/2203.05482"
    compat: ClassVar = {"mergekit": {"normalize": True}, "peft": {}}

    normalize: bool = parameter(False, "whether to divide by the sum of the weights, which gives a mean")

    def coefficients(self, gram: Array, weights: Array) -> Array:
        return shares(weights) if self.normalize else weights

    def sums(self, weights: Sequence[float]) -> list[float]:
        import numpy as np

        return [float(c) for c in self.coefficients(np.zeros(0), np.array(weights))]
