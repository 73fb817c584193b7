"""Spherical interpolation: D = (sin((1 - t) a) D_1 + sin(t a) D_2) / sin(a), where a is the angle between D_1 and D_2.

Shoemake 1985, https://doi.org/10.1145/325165.325242. If the changes are nearly parallel or opposite, the interpolation
is linear.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from ._combiner import Mixture, parameter, shares
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array


class Slerp(Mixture):
    """The spherical interpolation between two changes, at position t.

    The changes are not normalized. As t goes from 0 to 1, the result's norm goes from |D_1| to |D_2|.
    """

    title = "Spherical interpolation (SLERP)"
    paper = "https://doi.org/10.1145/325165.325242"
    takes = (2, 2)
    compat: ClassVar = {"mergekit": {}}

    t: float | None = parameter(
        None,
        "position between the first change (0) and the second (1); default: second weight / sum of weights",
        kind=float,
    )
    scale: float = parameter(1.0, SCALE)
    threshold: float = parameter(
        0.9995, "interpolate linearly if the magnitude of the changes' cosine similarity is above this", least=0, most=1
    )

    def coefficients(self, gram: Array, weights: Array) -> Array:
        import numpy as np

        if len(gram) == 1:
            return np.full(1, self.scale)
        t = float(shares(weights)[1]) if self.t is None else self.t
        sizes = np.sqrt(gram.diagonal())
        cosine = float(np.clip(gram[0, 1] / (sizes.prod() or 1.0), -1, 1))
        if abs(cosine) > self.threshold:
            return self.scale * np.array([1 - t, t])
        angle = math.acos(cosine)
        return self.scale / math.sin(angle) * np.array([math.sin((1 - t) * angle), math.sin(t * angle)])
