"""Model Stock: D = t * mean_i D_i with t = N c / (1 + (N - 1) c), where c is the mean cosine between the N changes.

Jang et al. 2024, https://arxiv.org/abs/2403.19522
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import Mixture, parameter

if TYPE_CHECKING:
    from ...io.computed import Array


class ModelStock(Mixture):
    """An estimate of the centre of fine-tuned weights, on the line from the base to the mean of the adapted weights.

    According to the paper, fine-tuned weights lie on a thin shell around a centre. The result is the point of the line
    that is nearest to this centre.
    """

    title = "Model Stock"
    paper = "https://arxiv.org/abs/2403.19522"
    compat: ClassVar = {"mergekit": {"clamp": False}}

    clamp: bool = parameter(True, "whether to replace a negative mean cosine by 0, so that the result is the base")

    def coefficients(self, gram: Array, weights: Array) -> Array:
        import numpy as np

        count = len(gram)
        if count == 1:
            return weights
        sizes = np.sqrt(gram.diagonal())
        cosines = gram / np.where(np.outer(sizes, sizes) > 0, np.outer(sizes, sizes), 1.0)
        c = float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))
        c = max(c, 0.0) if self.clamp else c
        below = 1 + (count - 1) * c
        t = count * c / below if abs(below) > 1e-8 else 0.0
        return weights * t / count
