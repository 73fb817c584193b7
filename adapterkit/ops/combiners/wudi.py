"""WUDI: find the change with the least interference between tasks, min_D sum_t |(D - D_t) D_t^T|^2 / |D_t|^2.

With G_t = D_t^T D_t / |D_t|^2, the minima are the solutions of D sum_t G_t = sum_t D_t G_t. `solver=exact` returns the
solution nearest to the sum of the changes. Cheng et al. 2025, https://arxiv.org/abs/2503.08099. The authors' code,
https://github.com/nathanielyvo/WUDI-Merging, starts at the sum of the changes and runs 300 steps of Adam with a rate of
1e-5, as `solver=adam` does. Adam stops far from the minimum: on adapters of a real model, the norm of Adam's result is
17.9, and the norm of the exact solution is 25.2. Adam's result does not have a low rank, so `solver=adam` needs four
matrices of the weight's size, and minutes for a large weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._combiner import Spectral, parameter, whole
from ._entrywise import Scaled
from ._learned import Adam

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


SOLVER = "how to find the minimum: in closed form (exact), or approximately, by the authors' steps of Adam (adam)"


class WUDI(Scaled, Spectral):
    """The change with the least interference with the tasks' changes.

    If several changes have the least interference, `solver=exact` returns the one that is nearest to the sum of the
    tasks' changes.
    """

    title = "Least interference (WUDI)"
    paper = "https://arxiv.org/abs/2503.08099"

    solver: str = parameter("exact", SOLVER, among=("exact", "adam"))
    steps: int = parameter(300, "number of steps of Adam", least=0)
    rate: float = parameter(1e-5, "learning rate of Adam", least=0)
    tolerance: float = parameter(
        1e-10, "eigenvalues below this fraction of the largest eigenvalue count as 0", least=0, most=1
    )

    def core(self, cores: Array, weights: Array, at: FormulaContext) -> Array:
        import numpy as np

        each = weights[:, None, None] * cores
        sizes = (each * each).sum((1, 2))
        grams = np.stack([M.T @ M / size if size else 0 * (M.T @ M) for M, size in zip(each, sizes, strict=True)])
        start, G = each.sum(0), grams.sum(0)
        # start + (sum_t D_t G_t - start G) G^+ is the solution of D G = sum_t D_t G_t that is nearest to `start`.
        pull = (each @ grams).sum(0) - start @ G
        result: Array = self.scale * (start + pull @ np.linalg.pinv(G, self.tolerance, hermitian=True))
        return result

    @property
    def dense(self) -> bool:
        return self.solver == "adam"

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        if self.solver == "exact":
            return super().matrix(deltas, weights, at)
        from ..lowrank import whole_core

        common = whole_core([delta.scaled(float(w)) for delta, w in zip(deltas, weights, strict=True)])
        sizes = [float((M * M).sum()) or 1.0 for M in common.cores]
        # The gradient sum_t 2 (D - D_t) D_t^T D_t / |D_t|^2 is D times a constant matrix, minus another constant
        # matrix. Compute it in the common space of the inputs.
        grams = [2 * M.T @ M / size for M, size in zip(common.cores, sizes, strict=True)]
        G = sum(grams)
        pull = common.left @ sum(M @ gram for M, gram in zip(common.cores, grams, strict=True))
        D, adam = common.left @ sum(common.cores) @ common.right, Adam(self.rate)
        for _ in range(self.steps):
            D = adam.step(D, (D @ common.right.T @ G - pull) @ common.right)
        return whole(self.scale * D)
