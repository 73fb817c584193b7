"""NearSwap: clip the entries of one change to the range from -t to t.

D' = D * min(1, t / |D|). The author is alchemonaut (2024), who used t = 0.0001 for the model
https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001. To move from adapter A towards adapter B, apply NearSwap
to B - A, and add A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula

LEAST = 1e-6
"""Smaller magnitudes are replaced by this number before the division, as in mergekit."""


class NearSwap(Entrywise):
    """lambda * D min(1, t / |D|)."""

    title = "NearSwap"
    paper = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    depends: ClassVar = frozenset({"size"})
    takes = (1, 1)
    compat: ClassVar = {"mergekit": {}}

    t: float = parameter(1e-4, "entries with a larger magnitude are clipped to -t or t", least=0)

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        def formula(changes: Array, _: slice) -> Array:
            D = weights[0] * changes[0]
            result: Array = self.scale * D * np.minimum(self.t / np.maximum(np.abs(D), LEAST), 1.0)
            return result

        return formula
