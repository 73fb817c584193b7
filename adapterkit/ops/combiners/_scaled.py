"""A base class with the parameter `scale`, for combiners whose formula applies to weights but not to biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._combiner import Combiner, parameter
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


class Scaled(Combiner):
    """A combiner with the parameter `scale`.

    The subclass multiplies changes of weights by `scale`; this class multiplies changes of biases.
    """

    scale: float = parameter(1.0, SCALE)

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self.scale * super().vector(changes, weights, at)
