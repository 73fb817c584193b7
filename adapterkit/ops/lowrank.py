"""Compute norms, distances and SVDs of low-rank products B @ A without computing the products.

With the QR decompositions B = Q_B R_B and A^T = Q_A R_A, the product B @ A equals Q_B (R_B R_A^T) Q_A^T. The small
matrix R_B R_A^T, `[r, r]`, is called the core of B @ A. It has the same norm and singular values as B @ A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .differences import too_large
from .lowering import Delta

if TYPE_CHECKING:
    from ..io.computed import Array


TALL = 4
"""A matrix with at least this many rows per column is orthonormalized with its Gram matrix instead of QR."""

INDEPENDENT = 1e-11
"""The largest absolute value of an element of Q^T Q - I that `orthonormal` accepts after its first round.

If an element is larger, `orthonormal` uses QR instead. This limit allows condition numbers up to 200.
"""

CONDITION = 1e3
"""The largest condition number, in the Frobenius norm, for which `triangle` uses a single Cholesky decomposition.

Up to this condition number, the computed R is accurate to within 1e-11.
"""

TINY_SQUARE = 1e-200
"""A Gram matrix is used only if each column's squared norm is between this value and `1 / TINY_SQUARE`.

Between these limits, the Gram matrix neither overflows nor loses digits.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Several changes of one weight in common coordinates: change t is `left @ cores[t] @ right`.

    Attributes:
        left: `[out, p]`, orthonormal columns.
        cores: one matrix `[p, q]` per change.
        right: `[q, in * k]`, orthonormal rows.
    """

    left: Array
    cores: tuple[Array, ...]
    right: Array


def core(deltas: Sequence[Delta]) -> Core:
    """Return the `Core` of several changes with low-rank factors."""
    import numpy as np

    left, R_B = orthonormal(np.hstack([delta.B for delta in deltas]))
    right, R_A = orthonormal(np.vstack([delta.A for delta in deltas]).T)
    return Core(left, _between(deltas, R_B, R_A), right.T)


def _between(deltas: Sequence[Delta], R_B: Array, R_A: Array) -> tuple[Array, ...]:
    """Return the core of each change.

    Args:
        deltas: the changes.
        R_B: the factor R of the QR decomposition of the concatenated B `[out, sum of ranks]`.
        R_A: the factor R of the QR decomposition of the concatenated A^T `[in * k, sum of ranks]`.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        cores = tuple(R_B[:, span] @ R_A[:, span].T for span in spans(deltas))
    return _finite(cores)


def spans(deltas: Sequence[Delta]) -> list[slice]:
    """Return one slice per change: its columns in the concatenated B, which are also its rows in the concatenated A."""
    import numpy as np

    ends = np.cumsum([delta.rank for delta in deltas])
    return [slice(end - delta.rank, end) for end, delta in zip(ends, deltas, strict=True)]


def images(deltas: Sequence[Delta], R: Array) -> Array:
    """Return a small matrix `[p, sum of ranks]` that gives the left singular vectors of the concatenated changes.

    Let Q R be the QR decomposition of the concatenated B. If u is a left singular vector of the small matrix, then Q u
    is a left singular vector of the concatenated changes [D_1 .. D_T]. The small matrix concatenates Q^T D_t V_t for
    all changes D_t. The columns of V_t are orthonormal, and their span contains all rows of D_t.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        stack = np.hstack(
            [R[:, span] @ triangle(delta.A.T).T for span, delta in zip(spans(deltas), deltas, strict=True)]
        )
    return _finite((stack,))[0]


def cores(deltas: Sequence[Delta]) -> tuple[Array, ...]:
    """Return only the cores of `whole_core`, one matrix `[p, q]` per change.

    The cores are enough to compute norms, angles and singular values.
    """
    import numpy as np

    if any(delta.rest is not None for delta in deltas):
        return whole_core(deltas).cores
    R_B = triangle(np.hstack([delta.B for delta in deltas]))
    R_A = triangle(np.vstack([delta.A for delta in deltas]).T)
    return _between(deltas, R_B, R_A)


def orthonormal(X: Array) -> tuple[Array, Array]:
    """Decompose X `[m, n]` into Q `[m, p]` with orthonormal columns and R `[p, n]`, with p = min(m, n).

    The function uses two rounds of Cholesky decomposition of a Gram matrix (Yamamoto et al. 2015). They take a third of
    the time of QR. The result is exact to rounding if the columns are far from linearly dependent; otherwise, QR is
    used.
    """
    import numpy as np

    n, decomposition = X.shape[1], _cholesky(X)
    if decomposition is None:
        return _plain_qr(X)
    L, sizes = decomposition
    Q = X @ (np.linalg.inv(L).T / sizes[:, None])
    G = Q.T @ Q
    # G differs from the identity by the rounding error times the squared condition number. So a large difference means
    # that columns are nearly dependent.
    if np.abs(G - np.eye(n)).max() > INDEPENDENT:
        return _plain_qr(X)
    second = np.linalg.cholesky(G)
    return Q @ np.linalg.inv(second).T, second.T @ L.T * sizes


def triangle(X: Array) -> Array:
    """Return R of the QR decomposition of X. If X is tall and well-conditioned, skip the computation of Q."""
    import numpy as np

    decomposition = _cholesky(X)
    if decomposition is not None:
        L, sizes = decomposition
        if np.linalg.norm(L) * np.linalg.norm(np.linalg.inv(L)) < CONDITION:
            upper: Array = L.T * sizes
            return upper
    return _plain_qr(X)[1]


def _cholesky(X: Array) -> tuple[Array, Array] | None:
    """Return (L, norms of X's columns). L L^T is the Gram matrix of X with each column scaled to norm 1.

    Return None if the caller should use QR instead.
    """
    import numpy as np

    m, n = X.shape
    if m < TALL * n or n < 2:
        return None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        G = X.T @ X
    squares = G.diagonal()
    if not TINY_SQUARE < squares.min() <= squares.max() < 1 / TINY_SQUARE:
        return None
    # Scale all columns to norm 1, because the columns may belong to adapters with very different magnitudes.
    sizes = np.sqrt(squares)
    try:
        return np.linalg.cholesky(G / sizes / sizes[:, None]), sizes
    except np.linalg.LinAlgError:
        return None


def _plain_qr(X: Array) -> tuple[Array, Array]:
    import numpy as np

    Q, R = np.linalg.qr(X)
    return Q, R


def whole_core(deltas: Sequence[Delta]) -> Core:
    """Return the `Core` of changes that may be dense.

    If any change is dense, `left` and `right` are identity matrices, and each core is the change itself.
    """
    import numpy as np

    if all(delta.rest is None for delta in deltas):
        return core(deltas)
    out, columns = deltas[0].shape
    return Core(np.eye(out), _finite(tuple(delta.dense() for delta in deltas)), np.eye(columns))


def _finite(arrays_given: tuple[Array, ...]) -> tuple[Array, ...]:
    """Check that the arrays are finite, and return them. With infinities or NaNs, decompositions do not converge.

    Raises:
        Malformed: the factors are so large that their product overflows.
    """
    import numpy as np

    # Check the sum of squares, because callers compute squared norms, which overflow before the elements do.
    with np.errstate(over="ignore", invalid="ignore"):
        if all(math.isfinite((one * one).sum()) for one in arrays_given):
            return arrays_given
    raise too_large()


def svd(delta: Delta) -> tuple[Array, Array, Array]:
    """Return the thin SVD of a change: U `[out, r]`, S `[r]` in descending order, and Vh `[r, in * k]`."""
    import numpy as np

    if delta.rest is not None:
        U, S, Vh = np.linalg.svd(delta.dense(), full_matrices=False)
        return U, S, Vh
    reduced = core([delta])
    U, S, Vh = np.linalg.svd(reduced.cores[0], full_matrices=False)
    return reduced.left @ U, S, Vh @ reduced.right


def norm(delta: Delta) -> float:
    """Return the Frobenius norm of a change."""
    return length(delta.dense()) if delta.rest is not None else length(cores([delta])[0])


def distance(one: Delta, other: Delta) -> float:
    """Return the Frobenius norm of the difference of two changes.

    The result is exact to rounding even if the changes are nearly equal.
    """
    if one.rest is not None or other.rest is not None:
        return length(one.dense() - other.dense())
    first, second = cores([one, other])
    return length(first - second)


def length(values: Array) -> float:
    """Return the square root of the sum of the squares of all elements."""
    return math.sqrt(float((values * values).sum()))
