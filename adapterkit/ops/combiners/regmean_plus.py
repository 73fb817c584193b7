"""RegMean++: RegMean with inputs from a model in which all earlier targets are already merged.

Nguyen et al. 2025, https://arxiv.org/abs/2508.03121
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ._combiner import Combiner, parameter
from .regmean import ALPHA, regressed

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class RegMeanPlus(Combiner):
    """The least-squares solution over all tasks, computed for one target after another."""

    title = "Regression mean over merged layers (RegMean++)"
    paper = "https://arxiv.org/abs/2508.03121"
    data: ClassVar[str | None] = (
        "a callable: inputs(index of the adapter, target's path, merged) -> X [samples, in * k], the target's inputs; "
        "merged is an adapter with the targets that are already merged, and None before the first target"
    )
    learns: ClassVar[str | None] = "inputs_so_far"
    sequential: ClassVar[bool] = True

    alpha: float = parameter(0.9, ALPHA, least=0, most=1)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        return regressed(deltas, weights, self.alpha, at)
