"""Compress, then merge: one pair of bases of rank r for all tasks, another method on r x r cores; of rank r, then.

The bases are a Tucker-2 decomposition of the tasks' cores (HOSVD, then HOOI), each brought to the norm
beta |D_t| + (1 - beta) mean |D|.  He et al. 2026, https://arxiv.org/abs/2606.03723; TIES trims each core for itself,
and beta, rounds and tolerance are as in https://github.com/ZhengbaoHe/compress-then-merge, whose README lets TIES keep
0.25 of the entries and scales the result by 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._changes import whole
from ._combiner import PlugIn, parameter

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class CtM(PlugIn):
    """U then(U^T D_1 V, .., U^T D_T V) V^T with U and V of r columns."""

    title = "Compress, then merge (CtM)"
    paper = "https://arxiv.org/abs/2606.03723"
    then: str = "ties"
    within: ClassVar = {"scope": "tensor"}

    rank: int | None = parameter(None, "r; the largest rank of a task if not given", least=1, kind=int)
    beta: float = parameter(0.25, "how much of a task's own norm it keeps when bases are sought", least=0, most=1)
    iterations: int = parameter(1000, "rounds of HOOI at most", least=0)
    tolerance: float = parameter(1e-6, "change of the relative error that ends it", least=0)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta
        from ..lowrank import whole_core

        common = whole_core(deltas)
        cores = np.stack(common.cores)
        rank = self.rank or max(delta.rank for delta in deltas)
        if rank < 1:
            raise UsageError("changes without thin factors have no rank to keep", where="rank", cure="Give one")
        U, V = self._bases(cores, min(rank, *cores.shape[1:]))
        merged = self.inner.matrix([whole(U.T @ M @ V) for M in cores], weights, at)
        return Delta(common.left @ U, merged.dense() @ (V.T @ common.right))

    def _bases(self, cores: Array, rank: int) -> tuple[Array, Array]:
        import numpy as np

        sizes = np.sqrt((cores * cores).sum((1, 2), keepdims=True))
        wanted = self.beta * sizes + (1 - self.beta) * sizes.mean()
        X = cores * np.where(sizes > 0, wanted / np.where(sizes > 0, sizes, 1.0), 0.0)
        U, V = _first(X, rank), _first(X.swapaxes(1, 2), rank)
        norm, error = float((X * X).sum()), np.inf
        for _ in range(self.iterations):
            U = _first(X @ V, rank)
            V = _first(X.swapaxes(1, 2) @ U, rank)
            kept = float(((U.T @ X @ V) ** 2).sum())
            now = float(np.sqrt(max(norm - kept, 0.0) / (norm or 1.0)))
            if error - now < self.tolerance:
                break
            error = now
        return U, V


def _first(X: Array, rank: int) -> Array:
    """The first left singular vectors of [X_1 .. X_T]."""
    import numpy as np

    # Left singular vectors of matrices side by side are the eigenvectors of the sum of their Gram matrices.
    vectors: Array = np.linalg.eigh((X @ X.swapaxes(1, 2)).sum(0))[1]
    return vectors[:, ::-1][:, :rank]
