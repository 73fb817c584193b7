"""LiNeS: multiply another method's result by a factor that is linear in the layer's depth.

The factor is alpha in the first layer, and alpha + beta in the last layer. Modules outside numbered layers also have
the factor alpha. Wang et al. 2024, https://arxiv.org/abs/2410.17146, https://github.com/wang-kee/LiNeS: shallow layers
contain general features and should change less. For T tasks, the authors choose beta (at most 1) on validation data.
Their alpha is |sum of the changes| / (T |merged change|); after task arithmetic, alpha is 1 / T. For a single task,
they use beta = 1 - alpha. Here, 1 - alpha is the default of beta for any number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import PlugIn, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class LiNeS(PlugIn):
    """(alpha + beta * depth) * then(D_1 .. D_T), where `then` is the other method.

    The depth is 0 in the first layer and outside numbered layers, and 1 in the last layer.
    """

    title = "LiNeS: another method's result, scaled by depth"
    paper = "https://arxiv.org/abs/2410.17146"
    by_depth = True

    alpha: float | None = parameter(
        None, "factor in the first layer and outside all layers; default: 1 / number of tasks", least=0, kind=float
    )
    beta: float | None = parameter(None, "the last layer's factor minus alpha; default: 1 - alpha", kind=float)

    @property
    def dense(self) -> bool:
        return self.inner.dense

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return self.inner.matrix(deltas, weights, at).scaled(self._factor(len(deltas), at))

    def vector(self, changes: Array, weights: Array, at: FormulaContext) -> Array:
        return self._factor(len(changes), at) * self.inner.vector(changes, weights, at)

    def _factor(self, count: int, at: FormulaContext) -> float:
        alpha = 1 / count if self.alpha is None else self.alpha
        return alpha + (1 - alpha if self.beta is None else self.beta) * (at.depth or 0.0)
