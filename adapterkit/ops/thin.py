"""Algebra of products of thin factors: everything by QR of the factors and decompositions of small cores.

B @ A of rank r is never formed: with thin QR, B = Q_B R_B and A^T = Q_A R_A, it is Q_B (R_B R_A^T) Q_A^T, and what is
asked of it (norms, angles, singular values) is asked of the small matrix in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .differences import too_large
from .lowering import Delta

if TYPE_CHECKING:
    from ..tensors.computed import Array


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Several changes of one weight in common coordinates: change t is `left @ cores[t] @ right`.

    Attributes:
        left: `[out, p]`, orthonormal columns.
        cores: `[p, q]` each.
        right: `[q, in * k]`, orthonormal rows.
    """

    left: Array
    cores: tuple[Array, ...]
    right: Array


def core(deltas: Sequence[Delta]) -> Core:
    """Changes with thin factors in the coordinates that all of them span."""
    import numpy as np

    left, R_B = thin_qr(_joined([delta.B for delta in deltas], 1))
    right, R_A = thin_qr(_joined([delta.A for delta in deltas], 0).T)
    ends = np.cumsum([delta.rank for delta in deltas])
    spans = [slice(end - delta.rank, end) for end, delta in zip(ends, deltas, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        cores = tuple(R_B[:, span] @ R_A[:, span].T for span in spans)
    return Core(left, _finite(cores), right.T)


def _joined(factors: Sequence[Array], axis: int) -> Array:
    import numpy as np

    return factors[0] if len(factors) == 1 else np.concatenate(factors, axis)


NEAR = 1e-10
"""Squares of columns below this part of the largest are too near to its rounding for `thin_qr` by Gram matrices."""


def thin_qr(tall: Array) -> tuple[Array, Array]:
    """Return Q `[m, n]` with orthonormal columns and R `[n, n]`, Q @ R = tall.

    Householder's QR of a matrix of 16 columns takes eight times as long as its products. So Q is found by Cholesky's
    decomposition of the Gram matrix, twice: the second time makes it orthonormal to rounding (Yamamoto et al. 2015,
    https://doi.org/10.1553/etna_vol44s306). Columns that are nearly dependent go to
    Householder's.
    """
    import numpy as np

    if tall.shape[1] == 0 or tall.shape[0] < 4 * tall.shape[1]:
        return _two(np.linalg.qr(tall))
    Q, R = tall, np.eye(tall.shape[1])
    for _ in range(2):
        with np.errstate(over="ignore", invalid="ignore"):
            gram = Q.T @ Q
        try:
            L = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return _two(np.linalg.qr(tall))
        sizes = np.diagonal(L) ** 2
        if not sizes.min(initial=np.inf) > NEAR * gram.max(initial=0.0):
            return _two(np.linalg.qr(tall))
        Q, R = Q @ np.linalg.inv(L).T, L.T @ R
    return Q, R


def _two(found: Any) -> tuple[Array, Array]:
    return found[0], found[1]


def whole_core(deltas: Sequence[Delta]) -> Core:
    """The same of changes that may have no thin factors: then the coordinates are those of the weight itself."""
    import numpy as np

    if all(delta.rest is None for delta in deltas):
        return core(deltas)
    out, columns = deltas[0].shape
    return Core(np.eye(out), _finite(tuple(delta.dense() for delta in deltas)), np.eye(columns))


def _finite(cores: tuple[Array, ...]) -> tuple[Array, ...]:
    """The cores, if their numbers are finite: decompositions do not converge on others.

    Raises:
        Malformed: factors are so large that their product is not.
    """
    import numpy as np

    # Squares of the norms are what callers compute with.
    with np.errstate(over="ignore", invalid="ignore"):
        if all(math.isfinite((core * core).sum()) for core in cores):
            return cores
    raise too_large()


def svd(delta: Delta) -> tuple[Array, Array, Array]:
    """The thin singular value decomposition of a change: U `[out, r]`, S `[r]`, largest first, Vh `[r, in * k]`."""
    import numpy as np

    if delta.rest is not None:
        return _plain(np.linalg.svd(delta.dense(), full_matrices=False))
    own = core([delta])
    U, S, Vh = np.linalg.svd(own.cores[0], full_matrices=False)
    return own.left @ U, S, Vh @ own.right


def norm(delta: Delta) -> float:
    """The Frobenius norm."""
    return _size(delta.dense()) if delta.rest is not None else _size(core([delta]).cores[0])


def distance(one: Delta, other: Delta) -> float:
    """The Frobenius norm of the difference, to rounding also where the two are nearly the same."""
    if one.rest is not None or other.rest is not None:
        return _size(one.dense() - other.dense())
    both = core([one, other])
    return _size(both.cores[0] - both.cores[1])


def _size(matrix: Array) -> float:
    return math.sqrt(float((matrix * matrix).sum()))


def _plain(found: Any) -> tuple[Array, Array, Array]:
    return found[0], found[1], found[2]
