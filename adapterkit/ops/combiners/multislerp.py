"""Spherical mean in one step: average the changes as unit vectors in the tangent space at their mean direction.

u_t = D_t / |D_t|;  m = sum w u / |sum w u|;  v = sum_t w_t (u_t - (u_t . m) m);
D = (m cos|v| + v sin|v| / |v|) * sum_t w_t |D_t|.  Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import Mixture, parameter, shares
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array


class MultiSlerp(Mixture):
    """The exponential map of the mean tangent vector at the mean direction, times the mean length."""

    title = "Spherical mean of several (MultiSLERP)"
    paper = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    compat: ClassVar = {"mergekit": {}}

    normalize: bool = parameter(True, "whether to divide the weights by their sum")
    scale: float = parameter(1.0, SCALE)
    eps: float = parameter(1e-8, "norms below this number count as 0", least=0)

    def coefficients(self, gram: Array, weights: Array) -> Array:
        import numpy as np

        w = shares(weights) if self.normalize else weights
        sizes = np.sqrt(gram.diagonal())
        if not sizes.any():
            return np.zeros(len(w))
        inverse = np.where(sizes > 0, 1 / np.where(sizes > 0, sizes, 1.0), 0.0)
        cosines = gram * np.outer(inverse, inverse)
        length = float(np.sqrt(max(w @ cosines @ w, 0.0)))
        if length <= self.eps:
            raise UsageError("the weighted directions sum to 0, so they have no mean", cure="Choose other weights")
        m = w / length
        # The arrays m and v contain coefficients of the u_t. The coefficients of v are w - ((sum_t w_t u_t) . m) m.
        v = w - float(w @ cosines @ m) * m
        size = float(np.sqrt(max(v @ cosines @ v, 0.0)))
        turned = m * np.cos(size) + (v * (np.sin(size) / size) if size > self.eps else 0.0)
        result: Array = turned * inverse * (self.scale * float(w @ sizes))
        return result
