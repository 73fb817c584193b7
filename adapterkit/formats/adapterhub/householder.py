"""torch's orthogonal parametrization of a wide matrix: rows of Q^T with Q = base @ H_1 ... H_r, signs from a diagonal.

`original` [r, n], transposed, holds below its diagonal the Householder vectors, whose first entry is 1, and on it the
signs; `base` is [n, n]. Formula: torch/nn/utils/parametrizations.py (`_Orthogonal`), LAPACK's orgqr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...io.lazy import Lazy, as_array

if TYPE_CHECKING:
    import numpy as np

NEAR = 1e-6
"""How far two evaluations in single precision may be apart."""


def composed(original: Lazy, base: Lazy) -> Lazy:
    """The parametrized matrix [r, n], in the type of `original`."""

    def fetch() -> bytes:
        return bytes(_rows(original, base).astype(original.dtype.array).tobytes())

    return Lazy(original.shape, original.dtype, fetch)


def taken_apart(matrix: Lazy) -> tuple[Lazy, Lazy]:
    """`original` and `base` for a matrix [r, n] of orthonormal rows, as the parametrization chooses them."""
    r, n = matrix.shape

    def minus_one() -> bytes:
        import numpy as np

        return bytes((-np.eye(r, n)).astype(matrix.dtype.array).tobytes())

    def completed() -> bytes:
        import numpy as np

        columns = as_array(matrix).astype(np.float64).T
        whole, _ = np.linalg.qr(columns, mode="complete")
        whole[:, :r] = columns
        return bytes(whole.astype(matrix.dtype.array).tobytes())

    return Lazy((r, n), matrix.dtype, minus_one), Lazy((n, n), matrix.dtype, completed)


def says(original: Lazy, base: Lazy, matrix: Lazy) -> bool:
    """Whether the parametrization of these two is a matrix, but for rounding."""
    import numpy as np

    near = np.abs(_rows(original, base) - as_array(matrix).astype(np.float64)) <= NEAR
    return original.shape == matrix.shape and bool(near.all())


def _rows(original: Lazy, base: Lazy) -> np.ndarray[Any, Any]:
    import numpy as np

    X = as_array(original).astype(np.float64).T
    Q = np.eye(*X.shape)
    for position in reversed(range(X.shape[1])):
        v = np.zeros(len(X))
        v[position], v[position + 1 :] = 1, X[position + 1 :, position]
        Q -= 2 / (v @ v) * np.outer(v, v @ Q)
    rows: np.ndarray[Any, Any] = (as_array(base).astype(np.float64) @ (Q * X.diagonal().astype(np.int64))).T
    return rows
