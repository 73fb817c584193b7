"""Task arithmetic: D = lambda * sum_t w_t D_t.  Ilharco et al. 2022, https://arxiv.org/abs/2212.04089"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import Mixture, parameter
from ._entrywise import SCALE

if TYPE_CHECKING:
    from ...io.computed import Array


class TaskArithmetic(Mixture):
    """D = lambda * sum_t w_t D_t, divided by sum_t w_t if `normalize` is set."""

    title = "Task arithmetic"
    paper = "https://arxiv.org/abs/2212.04089"
    compat: ClassVar = {"mergekit": {}, "peft": {}}

    scale: float = parameter(1.0, SCALE)
    normalize: bool = parameter(False, "whether to divide by the sum of the weights, unless this sum is 0")

    def coefficients(self, gram: Array, weights: Array) -> Array:
        return self.scale * weights / (self._total(weights) or 1.0)

    def sums(self, weights: Sequence[float]) -> list[float]:
        return [self.scale * weight / (self._total(weights) or 1.0) for weight in weights]

    def _total(self, weights: Sequence[float] | Array) -> float:
        return float(sum(weights)) if self.normalize else 1.0
