"""Round weights for given activations: round columns in blocks, and let later columns compensate the rounding error.

The error to minimize is that of a layer's outputs for activations X: tr((Q - W) H (Q - W)^T) with H = X^T X. GPTQ
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a block of columns, and moves the error by the inverse of
H to the columns that are not rounded yet. Here the scheme packs the whole weight for each block, so the same code works
for every scheme. Afterwards, each block is rounded a second time to compensate the errors of all other blocks; a row is
changed only if its error decreases. The second round is needed because a scale may change after some of its columns
were rounded.

H is increased in the directions to which the adapter responds. Otherwise the adapter's change would be lost first,
because it is small relative to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.lazy import Array

COLUMNS = 16
"""The smallest number of columns in a block."""

BLOCKS = 96
"""The largest number of blocks of a weight; the weight is packed twice for each block."""

DAMPING = 0.01
"""The fraction of the mean of H's diagonal that is added to the diagonal: texts do not activate all directions."""

ADAPTER = 10.0
"""Weight of the directions to which the adapter responds, in units of the mean of H's diagonal."""


def weighting(inputs: Array, directions: Array) -> Array:
    """Return H `[width, width]`, float64: the mean of x x^T over inputs, plus damping, plus the adapter's directions.

    Args:
        inputs: activations, `[tokens, width]`, float64.
        directions: the directions to which the adapter responds, `[k, width]`, orthonormal rows.
    """
    import numpy as np

    H = inputs.T @ inputs / len(inputs)
    mean = float(np.trace(H)) / len(H) or 1.0
    found: Array = H + mean * (ADAPTER * directions.T @ directions + DAMPING * np.eye(len(H)))
    return found


def swept(trip: Callable[[Array], Array], merged: Array, H: Array) -> Array:
    """Return weights to pack instead of the merged weights, so that outputs for the activations change less.

    Args:
        trip: a function that packs a weight `[outputs, inputs]` and returns the dequantized result.
        merged: the merged weight, `[outputs, inputs]`, float32.
        H: the result of `weighting`.

    Returns:
        float32, with the shape of `merged`; `merged` itself if no better weights were found.
    """
    import numpy as np

    width = merged.shape[1]
    step = max(COLUMNS, -(-width // (BLOCKS * COLUMNS)) * COLUMNS)
    found = _refined(trip, merged, H, _once(trip, merged, H, step), step)
    nearest = _lost(trip(merged) - merged, H).sum()
    return found if np.sum(_lost(trip(found) - merged, H)) < nearest else merged


def _once(trip: Callable[[Array], Array], merged: Array, H: Array, step: int) -> Array:
    """Round the blocks of columns one after another.

    Move the error of each block to the columns that are not rounded yet.
    """
    import numpy as np

    # Round the columns with the largest activations first, while many columns are left to compensate their errors.
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
    """Round each block again to compensate the errors of the other blocks; keep only rows whose error decreases.

    The first round cannot know the final errors: if a scale changes later, its elements are rounded again.
    """
    import numpy as np

    packed, nearest = trip(given), trip(merged)
    worse = _lost(nearest - merged, H) < _lost(packed - merged, H)
    given, packed = (np.where(worse[:, None], one, other) for one, other in ((merged, given), (nearest, packed)))
    slope = (packed - merged).astype(np.float64) @ H
    for start in range(0, merged.shape[1], step):
        now = slice(start, start + step)
        tried = packed.copy()
        tried[:, now] -= np.linalg.solve(H[now, now], slope[:, now].T).T.astype(np.float32)
        again = trip(tried)
        # With most schemes, only a few groups of columns change. Update E H by these columns only, because E H of the
        # whole weight would take most of the time.
        moved = (again - packed).astype(np.float64)
        columns = np.flatnonzero(moved.any(0))
        moved = moved[:, columns]
        gain = np.einsum("ij,ij->i", 2 * slope[:, columns] + moved @ H[np.ix_(columns, columns)], moved)
        better = gain < 0
        given[better], packed[better] = tried[better], again[better]
        slope[better] += moved[better] @ H[columns]
    return given


def _lost(error: Array, H: Array) -> Array:
    """Return the diagonal of E H E^T: the error of each output."""
    import numpy as np

    wide = error.astype(np.float64)
    lost: Array = np.einsum("ij,ij->i", wide @ H, wide)
    return lost
