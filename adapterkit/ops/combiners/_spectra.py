"""Functions for methods that use singular values: polar factors, leading directions, numerical rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...io.computed import Array

    Decomposition = tuple[Array, Array, Array]


def leading(M: Array, count: int | None = None) -> Decomposition:
    """Return a core's first singular values and vectors, U `[p, k]`, S `[k]`, Vh `[k, q]`, without rounding noise."""
    import numpy as np

    from ._changes import NOISE

    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    rank = int((NOISE * S[:1].max(initial=0) < S).sum())
    kept = rank if count is None else min(rank, count)
    return U[:, :kept], S[:kept], Vh[:kept]


def spanned(cores: Array) -> int:
    """Return the dimension of the span of all cores' columns or of all cores' rows, whichever is smaller."""
    import numpy as np

    from ._changes import NOISE

    # Compute the dimension, because shapes do not show it: dense changes have the shape of the weight, and factors may
    # be linearly dependent.
    both = (np.linalg.svd(side, compute_uv=False) for side in (np.hstack([*cores]), np.vstack([*cores])))
    return min(int((NOISE * S[:1].max(initial=0) < S).sum()) for S in both)


def polar(X: Array) -> Array:
    """Return the matrix with orthonormal columns (or rows, if X is wide) that is nearest to X."""
    import numpy as np

    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    nearest: Array = U @ Vh
    return nearest


def joined(parts: list[Decomposition]) -> Decomposition:
    """Concatenate several singular value decompositions, and make all singular vectors orthonormal to each other."""
    import numpy as np

    # Directions of different tasks are not orthogonal. The polar factor is the nearest matrix with orthonormal columns.
    U, S, Vh = zip(*parts, strict=True)
    return polar(np.hstack(U)), np.concatenate(S), polar(np.vstack(Vh))
