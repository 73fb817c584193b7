"""Compute the first singular values of a large matrix by a randomized sketch with an error bound, or exactly.

The sketch is subspace iteration from random vectors: Halko, Martinsson and Tropp 2011,
https://doi.org/10.1137/090771806. A bound on the first k singular values of D shows that the error is close to the
smallest possible error. With the basis Q, let R = D - Q Q^T D, let r be the largest squared singular value of R, and
let s_1 .. s_k be the first singular values of Q^T D. The sum of the first k squared singular values of D is at most
s_1^2 + .. + s_k^2, plus the smaller of two numbers:

- k r (Ky Fan 1949, for D^T D = (Q^T D)^T (Q^T D) + R^T R);
- the sum of max(r - s_i^2, 0) over i, plus the sum of the first k singular values of R D^T Q (the same theorem for
  D D^T).

Powers of R^T R, applied to random vectors, bound r (Dixon 1983, https://doi.org/10.1137/0720053). This bound is wrong
with a probability of at most 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from .differences import frobenius, left, too_large

if TYPE_CHECKING:
    import numpy as np

    from ..io.computed import Array
    from .criteria import Criterion

    Decomposition = tuple[Array, Array, Array]

SMALL = 384
"""Matrices whose smaller side is at most this number are decomposed exactly."""

GUESS = 32
"""The first rank that is tried if only an energy or an error is given."""

EXCESS = 0.02
"""By how much the error may exceed the smallest possible error, relative to that error."""

EXACT = 1e-6
"""A relative error below this number counts as zero; a low-rank change with rounding noise has such an error."""

DEPENDENT = 1e-9
"""Eigenvalues of a Gram matrix below this fraction of the largest eigenvalue are too close to rounding noise."""

TESTS = 8
POWERS = 24
"""To bound the largest singular value of R, R^T R is applied to TESTS random vectors, at most POWERS times."""


def dominant(D: Array, criterion: Criterion, seed: int) -> Decomposition:
    """Return the part of a matrix that a criterion keeps: U `[m, k]`, S `[k]`, Vh `[k, n]`.

    Args:
        D: `[m, n]`, float32 or float64.
        criterion: the criterion, which is applied to this matrix alone.
        seed: the seed of the random vectors.

    Returns:
        the decomposition. With a probability of 1 - 1e-8, its Frobenius error is at most 1 + EXCESS times the error of
        the best factors of the same rank.

    Raises:
        Malformed: the square of the matrix's norm is too large for float64.
    """
    import numpy as np

    small, norm = min(D.shape), frobenius(D)
    if not math.isfinite(norm):
        raise too_large()
    rank = min(criterion.rank or GUESS, small)
    random = np.random.default_rng(seed)
    # Try a cheap sketch, then a better sketch. If neither is good enough and a rank is given, decompose D exactly. For
    # an energy or an error, double the rank and try again, as long as a sketch is cheaper than the exact decomposition.
    while small > SMALL and 3 * rank <= small and norm > 0:
        for width, rounds in ((2 * rank + 16, 2), (3 * rank + 32, 4)):
            Q, rows, found = _sketch(D, min(width, small), rounds, random)
            kept = found[1][:rank]
            if not criterion.reached(kept, norm):
                break
            count = criterion.counts([kept], [norm])[0]
            if _good(D, Q, rows, found, count, norm, random):
                return first(found, count)
        rank = small if criterion.rank is not None else 2 * rank
    found = exact(D)
    return first(found, criterion.counts([found[1]], [norm])[0])


def approximated(D: Array, rank: int, seed: int) -> tuple[Decomposition, float, float]:
    """Return the first singular values and vectors of a matrix: exact if the matrix is small, else approximate.

    Args:
        D: `[m, n]`, float32 or float64.
        rank: the number of singular values.
        seed: the seed of the random vectors.

    Returns:
        the decomposition, the Frobenius norm of the matrix, and the Frobenius norm of the error.

    Raises:
        Malformed: the square of the matrix's norm is too large for float64.
    """
    import numpy as np

    norm, small = frobenius(D), min(D.shape)
    if not math.isfinite(norm):
        raise too_large()
    if small <= SMALL or 3 * rank > small or norm == 0:
        found = first(exact(D), rank)
    else:
        random = np.random.default_rng(seed)
        found = first(_sketch(D, min(2 * rank + 16, small), 2, random)[2], rank)
    U, S, Vh = found
    return found, norm, _lost(norm, S, lambda: left(D, U * S, Vh))


def streamed(
    rows: Callable[[], Iterable[tuple[slice, Array]]], shape: tuple[int, int], rank: int, seed: int
) -> tuple[Decomposition, float, float]:
    """Like `approximated`, for a matrix too large for memory. `rows`, which is called six times, yields its blocks."""
    import numpy as np

    m, n = shape
    width = min(2 * rank + 16, m, n)

    def times(X: Array) -> Array:
        """Return D @ X."""
        result = np.empty((m, X.shape[1]))
        for span, part in rows():
            result[span] = part @ X
        return result

    def under(Q: Array) -> tuple[Array, float]:
        """Return Q^T @ D and the squared norm of D."""
        result, square = np.zeros((Q.shape[1], n)), 0.0
        for span, part in rows():
            result += Q[span].T @ part
            square += frobenius(part) ** 2
        return result, square

    Q = _basis(times(np.random.default_rng(seed).standard_normal((n, width))))
    for _ in range(2):
        Q = _basis(times(_basis(under(Q)[0].T)))
    part, square = under(Q)
    if not math.isfinite(square):
        raise too_large()
    U, S, Vh = first(_by_gram(part), rank)
    norm = math.sqrt(square)
    return (Q @ U, S, Vh), norm, _lost(norm, S, None)


def _lost(norm: float, S: Array, measure: Callable[[], float] | None) -> float:
    """Return the norm of the part beyond the singular values S; call `measure` if the formula is too inexact."""
    square = norm**2 - float((S.astype("<f8") ** 2).sum())
    if square < 1e-6 * norm**2 and measure is not None:
        return measure()
    return math.sqrt(max(square, 0.0))


def exact(D: Array) -> Decomposition:
    """Return the full thin decomposition in float64; large matrices use the eigenvectors of the smaller Gram matrix."""
    import numpy as np

    D = D.astype(np.float64, copy=False)
    if D.size > SMALL * SMALL:
        return _by_gram(D)
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return U, S, Vh


def _by_gram(D: Array) -> Decomposition:
    import numpy as np

    if D.shape[0] > D.shape[1]:
        U, S, Vh = _by_gram(D.T)
        return Vh.T, S, U.T
    U = np.linalg.eigh(D @ D.T)[1][:, ::-1]
    # Compute singular values as norms of projections instead of from eigenvalues, because small eigenvalues are
    # rounding noise. The product of the three factors then equals D up to rounding.
    rows = U.T @ D
    S = np.sqrt((rows * rows).sum(1))
    order = np.argsort(-S, kind="stable")
    return U[:, order], S[order], rows[order] / np.maximum(S[order], np.finfo(float).tiny)[:, None]


def _sketch(D: Array, width: int, rounds: int, random: np.random.Generator) -> tuple[Array, Array, Decomposition]:
    """Return a basis Q `[m, width]` of D's main directions, Q^T D, and the decomposition of Q Q^T D."""
    import numpy as np

    Q = _basis(D @ random.standard_normal((D.shape[1], width), dtype=np.float32).astype(D.dtype))
    for _ in range(rounds):
        Q = _basis(D @ _basis(D.T @ Q))
    rows = Q.T @ D
    U, S, Vh = _by_gram(rows.astype(np.float64))
    return Q, rows, (Q @ U, S, Vh)


def _basis(block: Array) -> Array:
    """Return orthonormal columns with the same span, computed from the Gram matrix (Stathopoulos and Wu 2002)."""
    import numpy as np

    # The Gram matrix is much faster than QR, but inexact if columns are nearly dependent. The eigenvalues show whether
    # columns are nearly dependent.
    wide = block.astype(np.float64, copy=False)
    squares, vectors = np.linalg.eigh(wide.T @ wide)
    if squares[0] <= DEPENDENT * squares[-1]:
        return np.linalg.qr(block)[0]
    basis: Array = (wide @ (vectors / np.sqrt(squares))).astype(block.dtype)
    return basis


def _good(
    D: Array, Q: Array, rows: Array, found: Decomposition, count: int, norm: float, random: np.random.Generator
) -> bool:  # fmt: skip
    """Whether the error of the first `count` vectors of `found` is provably close to the smallest possible error."""
    U, S, Vh = first(found, count)
    square = max(norm**2 - float((S * S).sum()), 0.0)
    if square < 1e-4 * norm**2:
        square = frobenius(D - (U * S).astype(D.dtype) @ Vh.astype(D.dtype)) ** 2
    if square <= (EXACT * norm) ** 2:
        return True
    mixed = _mixed(D, Q, rows, count)
    return any(
        square <= (1 + EXCESS) ** 2 * (square - min(count * rest, mixed + float((rest - S * S).clip(0).sum())))
        for rest in _largest_squares(D, Q, random)
    )


def _mixed(D: Array, Q: Array, rows: Array, count: int) -> float:
    """Return the sum of the first `count` singular values of R D^T Q."""
    import numpy as np

    block = D @ rows.T
    block = (block - Q @ (Q.T @ block)).astype(np.float64, copy=False)
    return float(np.sqrt(np.linalg.eigvalsh(block.T @ block)[-count:].clip(0)).sum())


def _largest_squares(D: Array, Q: Array, random: np.random.Generator) -> Iterator[float]:
    """Yield upper bounds of the largest squared singular value of R = D - Q Q^T D, each tighter than the one before."""
    import numpy as np

    x = random.standard_normal((D.shape[1], TESTS), dtype=np.float32).astype(D.dtype)
    x /= np.sqrt((x * x).sum(0))
    log = 0.0
    for power in range(1, POWERS + 1):
        y = D @ x
        y -= Q @ (Q.T @ y)
        x = D.T @ y
        size = float(np.sqrt((x.astype(np.float64) ** 2).sum(0)).max())
        if size == 0:
            yield 0.0
            return
        # Keep the growth as a logarithm, and scale the vectors to norm 1, so that neither overflows.
        log += math.log(size)
        x /= size
        yield math.exp((log + math.log(8 * math.sqrt(D.shape[1]))) / power)


def first(found: Decomposition, count: int) -> Decomposition:
    """Return the first `count` singular values and vectors."""
    U, S, Vh = found
    return U[:, :count], S[:count], Vh[:count]
