"""Spherical interpolation: D = (sin((1 - t) a) D_1 + sin(t a) D_2) / sin(a), where a is the angle between the two.

Shoemake 1985, https://doi.org/10.1145/325165.325242. If the changes are nearly parallel or opposite, the interpolation
is linear.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from ._changes import shares
from ._combiner import Mixture, parameter

if TYPE_CHECKING:
    from ...io.computed import Array


class Slerp(Mixture):
    """The point on the great circle from the first change to the second; lengths are interpolated in the same way."""

    title = "Spherical interpolation (SLERP)"
    paper = "https://doi.org/10.1145/325165.325242"
    takes = (2, 2)
    compat: ClassVar = {"mergekit": {}}

    t: float | None = parameter(
        None,
        "fraction of the way from the first to the second; the second's share of the weights if not given",
        kind=float,
    )
    threshold: float = parameter(0.9995, "cosine from which the interpolation is linear", least=0, most=1)

    def coefficients(self, gram: Array, weights: Array) -> Array:
        import numpy as np

        if len(gram) == 1:
            return np.ones(1)
        t = float(shares(weights)[1]) if self.t is None else self.t
        sizes = np.sqrt(gram.diagonal())
        cosine = float(np.clip(gram[0, 1] / (sizes.prod() or 1.0), -1, 1))
        if abs(cosine) > self.threshold:
            return np.array([1 - t, t])
        angle = math.acos(cosine)
        return np.array([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)
