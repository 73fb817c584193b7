"""Task arithmetic: D = lambda * sum_t w_t D_t.  Ilharco et al. 2022, https://arxiv.org/abs/2212.04089"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._entrywise import SCALE
from ._method import Mixture, parameter

if TYPE_CHECKING:
    from ...tensors.computed import Array


class TaskArithmetic(Mixture):
    """D = lambda * sum_t w_t D_t."""

    title = "Task arithmetic"
    paper = "https://arxiv.org/abs/2212.04089"
    compat: ClassVar = {"mergekit": {}, "peft": {}}

    scale: float = parameter(1.0, SCALE)

    def coefficients(self, gram: Array, weights: Array) -> Array:
        return self.scale * weights

    def sums(self, weights: Sequence[float]) -> list[float]:
        return [self.scale * weight for weight in weights]
