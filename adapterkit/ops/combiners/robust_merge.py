"""RobustMerge: drop small entries of A and B, scale up each column of B to compensate, and sum A and B separately.

A = c sum_t A_t'; B = c sum_t B_t' diag(s_t), where A_t' and B_t' contain the kept entries. To compute s_t, divide the
L1 norm of each row of A_t by the L1 norm of the same row of A_t'. Raise ratios below a quantile of the task's ratios to
this quantile. Then divide each ratio by the sum of all tasks' ratios for the row. Zeng et al. 2025,
https://arxiv.org/abs/2502.17159. The defaults are from https://github.com/AuroraZengfh/RobustMerge (`mask_ratio`,
`att_ratio`, `fuse_weight` in llava/model/builder.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import ONE_RANK, Pairwise, parameter
from ._entrywise import COUNTS, DENSITY, KEPT, count_of, largest

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext


REFERENCE = KEPT.replace("int(p n) + 1 (reference)", "n - int((1 - p) n) + 1 (reference)")


class RobustMerge(Pairwise):
    """(c sum_t B_t' diag(s_t)) (c sum_t A_t'), with pruned A_t' and B_t'.

    The scales s_t compensate for the dropped entries of A_t, and are normalised across tasks.
    """

    title = "RobustMerge"
    paper = "https://arxiv.org/abs/2502.17159"
    depends: ClassVar = frozenset({"factors"})
    single = frozenset({"density"})

    density: float = parameter(0.2, DENSITY, least=0, most=1)
    kept: str = parameter("reference", REFERENCE, among=COUNTS)
    quantile: float = parameter(
        0.8, "a quantile of each task's scales; scales below the quantile are raised to it", least=0, most=1
    )
    scale: float = parameter(2.0, "c, the factor of A and of B")

    def factors(self, Bs: list[Array], As: list[Array], at: FormulaContext) -> tuple[Array, Array]:
        import numpy as np

        if len({len(A) for A in As}) > 1:
            raise UsageError(f"the ranks differ: {[len(A) for A in As]}", where=str(at.target), cure=ONE_RANK)
        A, B = (np.stack([self._pruned(X, t, at) for t, X in enumerate(each)]) for each in (As, Bs))
        after = np.abs(A).sum(2)
        scales = np.where(after > 0, np.abs(np.stack(As)).sum(2) / np.where(after > 0, after, 1.0), 0.0)
        ordered = np.sort(scales, 1)
        scales = np.maximum(scales, ordered[:, [min(int(self.quantile * ordered.shape[1]), ordered.shape[1] - 1)]])
        below = scales.sum(0)
        parts = scales / np.where(below > 0, below, 1.0)
        return self.scale * (B * parts[:, None, :]).sum(0), self.scale * A.sum(0)

    def _pruned(self, X: Array, t: int, at: FormulaContext) -> Array:
        density = at.each(self, "density")[t]
        if self.kept == "reference" and density < 1:
            # The authors keep the entry at position `int((1 - p) n)`, counted from 1 for the smallest entry, and all
            # larger entries. These are `ceil(p n) + 1` entries.
            return X * largest(X, min(X.size - int(X.size * (1 - density)) + 1, X.size))
        return X * largest(X, count_of(density, X.size, self.kept))
