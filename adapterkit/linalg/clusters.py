"""K-means with the result of scikit-learn's `KMeans(init="random", n_init=1)`, unless rounding decides the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import Unsupported

if TYPE_CHECKING:
    from ..io.lazy import Array

TOLERANCE = 1e-4
"""scikit-learn's stopping tolerance for the centers' movement, relative to the mean variance of the columns."""

CLOSE = 2e-6
"""The largest relative difference between two squared distances that counts as a tie: float32 cannot order them."""


def k_means(points: Array, count: int, rounds: int, seed: int) -> Array:
    """Return the cluster of each point as an int64 array `[n]`.

    scikit-learn (1.3 and later) computes in float32, so its result can depend on the machine if two centers are equally
    far from a point. This function computes in float64 and refuses such ties, so it gives the same result everywhere.

    Args:
        points: the points, `[n, d]`.
        count: the number of clusters, at most n.
        rounds: scikit-learn's `max_iter`.
        seed: scikit-learn's `random_state`.

    Raises:
        Unsupported: a tie decides the result.
    """
    import numpy as np

    X: Array = np.asarray(points, dtype=np.float64)
    X = X - X.mean(axis=0)
    # Pass probabilities, as scikit-learn does (its float32 sample weights): without them, `choice` draws differently.
    share = np.full(len(X), 1, dtype=np.float32) / np.float32(len(X))
    centers = X[np.random.RandomState(seed).choice(len(X), size=count, replace=False, p=share)]
    enough = TOLERANCE * float(np.var(X, axis=0).mean())
    labels: Array = np.full(len(X), -1)
    before = labels
    for _ in range(rounds):
        labels = _nearest(X, centers)
        moved = _centers(X, labels, count)
        shift, centers = float(((moved - centers) ** 2).sum()), moved
        if np.array_equal(labels, before):
            return labels
        if abs(shift - enough) <= CLOSE * enough:
            raise _tie("whether the centers still move")
        if shift <= enough:
            break
        before = labels
    return _nearest(X, centers)


def _nearest(X: Array, centers: Array) -> Array:
    import numpy as np

    distances = ((X[:, None, :] - centers[None]) ** 2).sum(axis=2)
    if len(centers) > 1:
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        if float((second - first).min()) <= CLOSE * float(distances.max()):
            raise _tie("which of two centers is nearer to a row")
    nearest: Array = distances.argmin(axis=1)
    return nearest


def _centers(X: Array, labels: Array, count: int) -> Array:
    import numpy as np

    if len(np.unique(labels)) < count:
        raise _tie("the new location of a center without rows")
    return np.stack([X[labels == cluster].mean(axis=0) for cluster in range(count)])


def _tie(what: str) -> Unsupported:
    why = f"the result of k-means depends on rounding: {what}"
    return Unsupported(why, cure="Run it on the machine where the adapter was trained")
