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

    left, R_B = np.linalg.qr(np.hstack([delta.B for delta in deltas]))
    right, R_A = np.linalg.qr(np.vstack([delta.A for delta in deltas]).T)
    ends = np.cumsum([delta.rank for delta in deltas])
    spans = [slice(end - delta.rank, end) for end, delta in zip(ends, deltas, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        cores = tuple(R_B[:, span] @ R_A[:, span].T for span in spans)
    return Core(left, _finite(cores), right.T)


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
