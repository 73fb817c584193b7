"""The parameter `scale` for combiners whose formula is for weights only, not for biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Combiner, parameter
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


class Scaled(Combiner):
    """A combiner with the parameter `scale`: its formula multiplies weights by it, and this class multiplies biases."""

    scale: float = parameter(1.0, SCALE)

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self.scale * super().vector(changes, weights, at)
