"""Rounding by activations: columns are rounded in turn, and those that follow make up for what rounding lost.

The error that matters is what a layer's output loses on real inputs X: tr((Q - W) H (Q - W)^T) with H = X^T X. GPTQ
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a block of columns and moves the error, by the inverse of
H, to the columns that are still open. Here each block is rounded by the scheme's own packing of the whole weight, so
that the same holds for every scheme. Then each block is rounded once more for the errors that the others have by then,
row by row where that helps: it mends what a sweep cannot foresee, that a scale changes under columns that are done.

The directions that the adapter reads are weighted on top of the activations: its change is small next to the weight,
and what is lost of it shows in every output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.lazy import Array

COLUMNS = 16
"""Columns that are rounded at a time, at least."""

BLOCKS = 96
"""Blocks of columns of one weight, at most: the weight is packed twice for each."""

DAMPING = 0.01
"""Part of the mean diagonal of H that is added to it: texts do not reach every direction."""

ADAPTER = 10.0
"""Weight of the directions that the adapter reads, in units of the mean diagonal of H."""


def weighting(inputs: Array, directions: Array) -> Array:
    """Return H, `[width, width]`, float64: the mean square of inputs, damped, and the adapter's directions.

    Args:
        inputs: activations, `[tokens, width]`, float64.
        directions: the directions that the adapter reads, `[k, width]`, orthonormal rows.
    """
    import numpy as np

    H = inputs.T @ inputs / len(inputs)
    mean = float(np.trace(H)) / len(H) or 1.0
    found: Array = H + mean * (ADAPTER * directions.T @ directions + DAMPING * np.eye(len(H)))
    return found


def swept(trip: Callable[[Array], Array], merged: Array, H: Array) -> Array:
    """Return numbers to pack in place of the merged ones, so that outputs on real inputs lose less.

    Args:
        trip: packs a weight, and returns the numbers that the packed one stands for, `[outputs, inputs]`.
        merged: the merged weight, `[outputs, inputs]`, float32.
        H: the weighting of `weighting`.

    Returns:
        float32 of the shape of `merged`; the merged numbers themselves where nothing is better.
    """
    import numpy as np

    width = merged.shape[1]
    step = max(COLUMNS, -(-width // (BLOCKS * COLUMNS)) * COLUMNS)
    found = _refined(trip, merged, H, _once(trip, merged, H, step), step)
    nearest = _lost(trip(merged) - merged, H).sum()
    return found if np.sum(_lost(trip(found) - merged, H)) < nearest else merged


def _once(trip: Callable[[Array], Array], merged: Array, H: Array, step: int) -> Array:
    """Round blocks of columns in turn, and move the error of each to the columns that are still open."""
    import numpy as np

    # The columns with the largest inputs come first: the most columns are left to make up for their errors.
    order = np.argsort(-np.diag(H), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    W = merged.astype(np.float64)
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        now, rest = order[start:stop], order[stop:]
        rounded = trip(W.astype(np.float32))[:, now].astype(np.float64)
        moved = np.linalg.solve(upper[start:stop, start:stop].T, (W[:, now] - rounded).T).T
        W[:, rest] -= moved @ upper[start:stop, stop:]
        W[:, now] = rounded
    swept_once: Array = W.astype(np.float32)
    return swept_once


def _refined(trip: Callable[[Array], Array], merged: Array, H: Array, given: Array, step: int) -> Array:
    """Round each block once more, for the errors that all others have now; keep it in the rows where less is lost.

    The numbers that one scale serves are rounded anew whenever it changes, which a sweep cannot foresee.
    """
    import numpy as np

    packed, nearest = trip(given), trip(merged)
    lost, plain = _lost(packed - merged, H), _lost(nearest - merged, H)
    worse = plain < lost
    given, packed = (np.where(worse[:, None], one, other) for one, other in ((merged, given), (nearest, packed)))
    lost = np.minimum(plain, lost)
    for start in range(0, merged.shape[1], step):
        now = slice(start, start + step)
        pull = (packed - merged).astype(np.float64) @ H[:, now]
        tried = packed.copy()
        tried[:, now] -= np.linalg.solve(H[now, now], pull.T).T.astype(np.float32)
        again = trip(tried)
        left = _lost(again - merged, H)
        better = left < lost
        given[better], packed[better], lost[better] = tried[better], again[better], left[better]
    return given


def _lost(error: Array, H: Array) -> Array:
    """Return the diagonal of E H E^T: what each output loses."""
    import numpy as np

    wide = error.astype(np.float64)
    lost: Array = np.einsum("ij,ij->i", wide @ H, wide)
    return lost
