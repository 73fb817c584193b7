"""Compress, then merge: find bases of r vectors that all tasks share, and apply another method to the r x r cores.

The result has rank r. The bases come from a Tucker-2 decomposition of the tasks' cores (HOSVD, then HOOI). For this
decomposition, each core is scaled to the norm `beta |D_t| + (1 - beta) mean |D|`. He et al. 2026,
https://arxiv.org/abs/2606.03723. The defaults of beta, iterations and tolerance are from the authors' code,
https://github.com/ZhengbaoHe/compress-then-merge. As in this code, TIES trims each core separately. The README of the
code sets TIES's density to 0.25 and scales the result by 0.75.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import PlugIn, parameter, whole

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..context import FormulaContext
    from ..lowering import Delta


class CtM(PlugIn):
    """U f(U^T D_1 V, .., U^T D_T V) V^T, where U and V have r columns, and f is the combiner `then`, such as TIES."""

    title = "Compress, then merge (CtM)"
    paper = "https://arxiv.org/abs/2606.03723"
    then: str = "ties"
    within: ClassVar = {"scope": "tensor"}

    rank: int | None = parameter(None, "rank r of the result; default: the largest rank of a task", least=1, kind=int)
    beta: float = parameter(
        0.25, "norms of the changes before the bases are computed: 0 makes them equal, 1 keeps them", least=0, most=1
    )
    iterations: int = parameter(1000, "maximum number of HOOI rounds", least=0)
    tolerance: float = parameter(1e-6, "stop after a round that reduces the relative error by less than this", least=0)

    def matrix(self, deltas: Sequence[Delta], weights: Array, at: FormulaContext) -> Delta:
        import numpy as np

        from ..lowering import Delta
        from ..lowrank import whole_core

        common = whole_core(deltas)
        cores = np.stack(common.cores)
        rank = self.rank or max(delta.rank for delta in deltas)
        if rank < 1:
            raise UsageError(
                "no change has low-rank factors, so rank has no default", where="rank", cure="Pass --rank N (rank=N)"
            )
        U, V = self._bases(cores, min(rank, *cores.shape[1:]))
        merged = self.inner.matrix([whole(U.T @ M @ V) for M in cores], weights, at)
        return Delta(common.left @ U, merged.dense() @ (V.T @ common.right))

    def _bases(self, cores: Array, rank: int) -> tuple[Array, Array]:
        import numpy as np

        sizes = np.sqrt((cores * cores).sum((1, 2), keepdims=True))
        wanted = self.beta * sizes + (1 - self.beta) * sizes.mean()
        X = cores * np.where(sizes > 0, wanted / np.where(sizes > 0, sizes, 1.0), 0.0)
        flipped = np.ascontiguousarray(X.swapaxes(1, 2))
        U, V = _first(_gram(X), rank), _first(_gram(flipped), rank)
        # A round needs only the spans of the previous round's vectors. The combiner named by `then` needs the vectors
        # themselves, so the vectors are computed once, after the last round.
        spans, before = _Spans(rank), None
        norm, error = float((X * X).sum()), np.inf
        for _ in range(self.iterations):
            before = V
            U, _ = spans.first(_gram(X, V), U)
            V, kept = spans.first(_gram(flipped, U), V)
            now = float(np.sqrt(max(norm - kept, 0.0) / (norm or 1.0)))
            if error - now < self.tolerance:
                break
            error = now
        if before is None:
            return U, V
        U = _first(_gram(X, before), rank)
        return U, _first(_gram(flipped, U), rank)


WIDE = 7
"""If a matrix has fewer columns than this factor times the rank, it is decomposed fully.

A full decomposition is then faster than the subspace iteration.
"""

SETTLED = 1e-10
"""The subspace iteration ends when a span's residual is below this fraction of the span's smallest eigenvalue."""

SPREAD = 1e5
"""In one step of the subspace iteration, the ratio between two vectors' lengths may grow by at most this factor.

A step multiplies the vectors by the matrix up to six times, and then orthonormalizes the vectors. The first product
does not count towards this limit.
"""

PRODUCTS = 24
"""The subspace iteration gives up after this many products with one matrix.

50 products take as long as the full decomposition of a matrix with 128 columns.
"""

PAUSE = 8
"""If the iteration fails for a matrix, this matrix and the following `PAUSE - 1` matrices are decomposed fully."""


def _gram(X: Array, V: Array | None = None) -> Array:
    """Return sum_t X_t V V^T X_t^T; if V is None, return sum_t X_t X_t^T."""
    import numpy as np

    tasks, rows, columns = X.shape
    Y = X if V is None else (X.reshape(-1, columns) @ V).reshape(tasks, rows, -1)
    # Concatenate the matrices of all tasks: one large product takes a third of the time of one product per task.
    side = np.ascontiguousarray(Y.swapaxes(0, 1)).reshape(rows, -1)
    product: Array = side @ side.T
    return product


def _first(gram: Array, rank: int) -> Array:
    """Return the `rank` eigenvectors with the largest eigenvalues of a Gram matrix.

    For `gram = _gram(X)`, the eigenvectors are the first left singular vectors of [X_1 .. X_T].
    """
    import numpy as np

    vectors: Array = np.linalg.eigh(gram)[1]
    return vectors[:, ::-1][:, :rank]


class _Spans:
    """Computes the span of the leading eigenvectors, for a sequence of matrices.

    Each matrix is close to an earlier matrix, so the iteration for its span can start from the earlier span.
    """

    def __init__(self, rank: int) -> None:
        # Decompose the two matrices of the first round fully, because the spans still change much in this round.
        self.rank, self.pause = rank, 2

    def first(self, gram: Array, near: Array) -> tuple[Array, float]:
        """Return an orthonormal basis of the span of the leading eigenvectors, and the sum of their eigenvalues.

        The iteration starts from `near`, a basis of the span for an earlier matrix that is close to `gram`.
        """
        import numpy as np

        if self.pause == 0 and WIDE * self.rank <= len(gram) and math.isfinite(gram.sum()):
            basis = _iterated(gram, near)
            if basis is not None:
                return basis
            self.pause = PAUSE
        self.pause = max(self.pause - 1, 0)
        values, vectors = np.linalg.eigh(gram)
        return vectors[:, ::-1][:, : self.rank], float(values[::-1][: self.rank].sum())


def _iterated(gram: Array, Q: Array) -> tuple[Array, float] | None:
    """Find the span of the leading eigenvectors by subspace iteration. Start from Q, a basis of a nearby span.

    Return a basis and the sum of the eigenvalues, or None if the iteration is slow or its result cannot be verified.
    """
    import numpy as np

    square, products = float((gram * gram).sum()), 0
    while products < PRODUCTS:
        image = gram @ Q
        inner = Q.T @ image
        values = np.linalg.eigvalsh(inner)
        # Check that the eigenvalues in the span are the largest ones. `outside` is the norm of the part of the matrix
        # outside the span, so no eigenvalue outside the span exceeds `outside`. The check fails if `outside` is not
        # below the span's smallest eigenvalue.
        outside = math.sqrt(max(square - float((inner * inner).sum()), 0.0))
        if outside >= values[0]:
            return None
        if float(((image - Q @ inner) ** 2).sum()) <= (SETTLED * values[0]) ** 2:
            return Q, float(values.sum())
        several = 1 + int(min(math.log(SPREAD) / max(math.log(values[-1] / values[0]), 0.1), 5))
        for _ in range(several - 1):
            image = gram @ image
        products += several
        try:
            L = np.linalg.cholesky(image.T @ image)
        except np.linalg.LinAlgError:
            return None
        Q = np.linalg.solve(L, image.T).T
    return None
