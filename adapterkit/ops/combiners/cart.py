"""CART: the mean of the changes, plus the leading directions of each task's difference from the mean.

D = mean + scale * sum_t top_k(D_t - mean). Choi et al. 2024, https://arxiv.org/abs/2412.12153. The defaults of `share`
and `scale` are the authors' values for eight tasks, https://github.com/JH-GEECS/CART (`initial_rank_ratio`, `prior`).
For 14 tasks, the authors use 0.16 and 1.5. They keep a share of all directions of the weight; `over=weight` does the
same. By default, this module keeps a share of the directions that the adapters span, as Core Space does,
https://arxiv.org/abs/2509.17786. The reason is that 12 % of the weight's directions are usually more than the rank of a
LoRA, so a share of all directions would drop little or nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._combiner import Spectral, leading, parameter, spanned

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


OVER = (
    "whether share is a fraction of the directions that the adapters span (core), "
    "or of all directions of the weight (weight)"
)


class CART(Spectral):
    """The mean of the changes, plus a low-rank approximation of each change's difference from the mean."""

    title = "Centred arithmetic with reduced-rank task vectors (CART)"
    paper = "https://arxiv.org/abs/2412.12153"

    share: float = parameter(0.12, "share of the directions that each difference from the mean keeps", least=0, most=1)
    over: str = parameter("core", OVER, among=("core", "weight"))
    scale: float = parameter(2.0, "factor by which the differences from the mean are multiplied")

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        each = weights[:, None, None] * cores
        centre = each.mean(0)
        directions = spanned(each) if self.over == "core" else min(at.shape[0], math.prod(at.shape[1:]))
        kept = max(int(self.share * directions), 1) if self.share else 0
        total = np.zeros_like(centre)
        for M in each:
            U, S, Vh = leading(M - centre, kept)
            total += (U * S) @ Vh
        result: Array = centre + self.scale * total
        return result
