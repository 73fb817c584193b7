"""Weighted sum: D = sum_t w_t D_t, exactly, factors beside one another.

Ilharco et al. 2022, https://arxiv.org/abs/2212.04089; averaged: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UsageError
from ._method import Mixture, parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array


class Linear(Mixture):
    """D = sum_t w_t D_t, over sum_t w_t if normalised."""

    title = "Weighted sum"
    paper = "https://arxiv.org/abs/2203.05482"
    compat = {"mergekit": {"normalize": True}, "peft": {}}

    normalize: bool = parameter(False, "divide by the sum of the weights: a mean")

    def coefficients(self, gram: Array, weights: Array) -> Array:
        if not self.normalize:
            return weights
        if not weights.sum():
            raise UsageError("the weights sum to 0", where="weights", cure="Choose others, or normalize=False")
        return weights / weights.sum()
