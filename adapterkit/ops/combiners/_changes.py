"""Functions that combiners use on the changes of one weight.

They compute inner products, sums of factors and small cores, and from singular values polar factors, leading directions
and the numerical rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...linalg.namespace import summed
from ..lowering import Delta

if TYPE_CHECKING:
    from ...io.computed import Array

TINY = 1e-12
"""A sum of weights counts as zero if it is below this fraction of the sum of their magnitudes."""

NOISE = 1e-13
"""Singular values below this fraction of the largest singular value count as rounding noise."""


def shares(weights: Array) -> Array:
    """Divide weights by their sum.

    Raises:
        UsageError: the sum is zero.
    """
    whole = weights.sum()
    if abs(whole) < TINY * abs(weights).sum() or whole == 0:
        raise UsageError("the weights sum to 0", where="weights", cure="Choose weights whose sum is not 0")
    result: Array = weights / whole
    return result


def gram(deltas: Sequence[Delta]) -> Array:
    """Return <D_s, D_t> for all pairs of changes, `[T, T]`, without forming the products of factors."""
    import numpy as np

    if any(delta.rest is not None for delta in deltas):
        flat = np.stack([delta.dense().ravel() for delta in deltas])
        product: Array = flat @ flat.T
        return product
    # <B_s A_s, B_t A_t> is the sum over the entries of (B_s^T B_t) * (A_s A_t^T). These matrices have the size of the
    # ranks, not of the weight.
    found = np.empty((len(deltas), len(deltas)))
    for s, one in enumerate(deltas):
        for t, other in enumerate(deltas[: s + 1]):
            found[s, t] = found[t, s] = float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())
    return found


def mixed(deltas: Sequence[Delta], coefficients: Array) -> Delta:
    """Return sum_t coefficients[t] * D_t; factors are concatenated."""
    import numpy as np

    scaled = [delta.scaled(float(c)) for delta, c in zip(deltas, coefficients, strict=True)]
    rests = [delta.rest for delta in scaled if delta.rest is not None]
    B, A = np.hstack([delta.B for delta in scaled]), np.vstack([delta.A for delta in scaled])
    return Delta(B, A, summed(rests) if rests else None)


def whole(D: Array) -> Delta:
    """Return a change without low-rank factors from an array `[out, in * k]`."""
    import numpy as np

    return Delta(np.zeros((len(D), 0)), np.zeros((0, D.shape[1])), D)


def between(left: Array, core: Array, right: Array) -> Delta:
    """Return left @ core @ right as B and A, which share the singular values evenly, without rounding noise."""
    import numpy as np

    U, S, Vh = np.linalg.svd(core, full_matrices=False)
    kept = max(int((NOISE * S[:1].max(initial=0) < S).sum()), 1)
    root = np.sqrt(S[:kept])
    return Delta(left @ (U[:, :kept] * root), (root[:, None] * Vh[:kept]) @ right)


if TYPE_CHECKING:
    Decomposition = tuple[Array, Array, Array]


def leading(M: Array, count: int | None = None) -> Decomposition:
    """Return a core's first singular values and vectors, U `[p, k]`, S `[k]`, Vh `[k, q]`, without rounding noise."""
    import numpy as np

    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    rank = int((NOISE * S[:1].max(initial=0) < S).sum())
    kept = rank if count is None else min(rank, count)
    return U[:, :kept], S[:kept], Vh[:kept]


def spanned(cores: Array) -> int:
    """Return the dimension of the span of all cores' columns or of all cores' rows, whichever is smaller."""
    import numpy as np

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
