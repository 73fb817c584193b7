"""Karcher mean: find the point on the sphere with the least sum of squared angles to the changes, by iteration.

Karcher 1977, https://doi.org/10.1002/cpa.3160300502; for models: https://arxiv.org/abs/2603.04972
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import Mixture, parameter, shares
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array


class Karcher(Mixture):
    """The Karcher mean of the changes' directions, times the weighted mean of their norms."""

    title = "Karcher mean"
    paper = "https://arxiv.org/abs/2603.04972"
    compat: ClassVar = {"mergekit": {"iterations": 10}}

    scale: float = parameter(1.0, SCALE)
    iterations: int = parameter(100, "maximum number of steps", least=1)
    tolerance: float = parameter(1e-5, "stop if the next step would be shorter than this", least=0)

    def coefficients(self, gram: Array, weights: Array) -> Array:
        """Return the coefficients of the mean.

        The coefficients depend only on the changes' norms and cosines, because every vector of the iteration is a
        weighted sum of the changes' unit vectors.
        """
        import numpy as np

        sizes = np.sqrt(gram.diagonal())
        valid = sizes > self.tolerance
        inverse = np.where(valid, 1 / np.where(valid, sizes, 1.0), 0.0)
        cosines = gram * np.outer(inverse, inverse)
        w = shares(weights)
        parts = valid * w / ((valid * w).sum() or 1.0)
        mean = _unit(parts, cosines, self.tolerance)
        # If the weighted sum of the points is zero, it has no direction. Start at one of the points instead.
        if mean is None:
            mean = np.eye(len(w))[int(valid.argmax())]
        for _ in range(self.iterations):
            dots = np.clip(cosines @ mean, -1.0, 1.0)
            angles = np.arccos(dots)
            apart = valid & (angles >= self.tolerance)
            # Move the mean m along the weighted sum of log_m(u) over all points u. On the sphere, log_m(u) is
            # a / sin(a) * (u - cos(a) m), where a is the angle between u and m.
            pull = np.where(apart, parts * angles / np.where(apart, np.sin(angles), 1.0), 0.0)
            tangent = pull - float(pull @ dots) * mean
            size = float(np.sqrt(max(tangent @ cosines @ tangent, 0.0)))
            if size < self.tolerance:
                break
            moved = np.cos(size) * mean + np.sin(size) / size * tangent
            unit = _unit(moved, cosines, self.tolerance)
            mean = moved if unit is None else unit
        return mean * inverse * (self.scale * float(w @ sizes))


def _unit(vector: Array, cosines: Array, tolerance: float) -> Array | None:
    size = max(float(vector @ cosines @ vector), 0.0) ** 0.5
    return None if size < tolerance else vector / size
