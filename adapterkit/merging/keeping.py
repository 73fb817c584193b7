"""Adjust merged weights before quantization, so that the quantized weights keep the adapter's change.

Let `W` be the base's weight, `M` the merged weight, and `D = M - W` the change. Rounding M to the nearest loses D if D
is smaller than a quantization step. Another rounding can keep D, because the elements of a row together can represent
D. Let `V` be the right singular vectors of D: the directions of the inputs to which D responds. The functions `kept`
and `swept` call the scheme's packing function to round, so they work for every scheme.

`kept` needs no data. It looks for the quantized matrix `Q` that is nearest to M, subject to `(Q - M) V = 0`. With
Lagrange multipliers `C`, Q is `M + C V^T` rounded to the nearest. C is found by gradient ascent, row by row; the
gradient is the part of the error along V. The shift `C V^T` changes elements by whole quantization steps. So the shift
adds errors in all other directions, and these errors add up over the layers. Each row gets the shift with the smallest
squared error; errors along V count `OFTEN` times as much as errors in other directions. One of the candidates is the
shift 0, which is rounding to the nearest.

`swept` uses recorded inputs `X` of the layer. It minimizes the error of the layer's outputs,
`tr((Q - M) H (Q - M)^T)` with `H = X^T X`. GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a block
of columns, and uses the inverse of H to move the error to the columns that are not rounded yet. Here the scheme packs
the whole weight for each block. Afterwards, each block is rounded a second time to compensate for the errors of
all other blocks; a row is changed only if its error decreases. The second round is needed because a scale may change
after some of the columns that use it were rounded. H is increased in the directions to which the adapter responds.
Otherwise the adapter's change would be lost first, because it is small relative to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.lazy import Array


DIRECTIONS = 64
"""The largest number of directions that are kept for one weight."""

SHARE = 8
"""At most one direction is kept for this many inputs of a weight; more directions cannot all be kept."""

WEAK = 1e-3
"""A direction is not kept if its singular value is at most this fraction of the largest singular value."""

OFTEN = 8.0
"""The factor for the squared error along the change's directions; for all other directions, the factor is 1.

Percentage of a LoRA's effect that survives with other factors, measured on SmolLM2-135M in nf4:

    factor          1 (nearest)   8    16    32   no limit
    all layers             4     37    63   -81       -277
    o_proj                 4     28    62    83         84
    q_proj, v_proj         7     42   -47  -331       -555
    down_proj              2     11     1  -356       -866
"""

ROUNDS = 24
"""The largest number of steps of the gradient ascent. Each step packs the weight once."""

ENOUGH = 0.02
"""The search ends when each row's smallest error along the directions is at most this fraction of its first error."""

STILL, TURNED = 0.7, -0.2
"""Thresholds for the ratio of a row's error after a step to its error before the step, both along the directions.

If the ratio is above `STILL`, the error hardly changed. If it is below `TURNED`, the error changed its sign.
"""

LONGER, SHORTER = 1.6, 0.6
"""The step is multiplied by `LONGER` if the ratio is above `STILL`, and by `SHORTER` if it is below `TURNED`."""


def directions(D: Array, seed: int) -> Array:
    """Return the directions of the inputs to which a change responds, `[k, inputs]`, as orthonormal rows in float64.

    Args:
        D: the change, `[outputs, inputs]`, float64.
        seed: the seed of the decomposition of a large matrix.
    """
    from ..ops.sketching import Criterion, dominant

    most = max(1, min(DIRECTIONS, D.shape[1] // SHARE, *D.shape))
    _, S, Vh = dominant(D, Criterion(most), seed)
    return Vh[WEAK * S[0] < S] if len(S) else Vh


def kept(trip: Callable[[Array], Array], merged: Array, directions: Array) -> Array:
    """Adjust merged weights without data, so that they keep more of the adapter's change after packing.

    Args:
        trip: a function that packs weights `[experts, outputs, inputs]` and returns the dequantized result.
        merged: the merged weights, `[experts, outputs, inputs]`, float32.
        directions: `[experts, k, inputs]`, orthonormal rows for each expert; zero rows pad the directions of an expert
            to k.

    Returns:
        float32, with the shape of `merged`; `merged` itself if no better weights were found.
    """
    import numpy as np

    M, Vh = merged.astype(np.float64), directions
    V = Vh.swapaxes(1, 2)
    C, step = np.zeros((*M.shape[:2], Vh.shape[1])), np.ones((*M.shape[:2], 1))
    error = trip(merged) - M
    lost = error @ V
    first = smallest = np.linalg.norm(lost, axis=2, keepdims=True)
    nearest = least = _weighed(error, lost)
    best = C
    for _ in range(ROUNDS):
        if (smallest <= ENOUGH * first).all():
            break
        C = C - step * lost
        error = trip(_shifted(M, C, Vh)) - M
        now = error @ V
        # Lengthen the step if the error stays the same: a shift below half a quantization step changes nothing. Shorten
        # the step if the error changes its sign.
        square = (lost * lost).sum(2, keepdims=True)
        left = np.divide((now * lost).sum(2, keepdims=True), square, out=np.zeros_like(square), where=square > 0)
        step = step * np.where(left > STILL, LONGER, np.where(left < TURNED, SHORTER, 1.0))
        weighted = _weighed(error, now)
        best, least = np.where(weighted < least, C, best), np.minimum(weighted, least)
        smallest = np.minimum(smallest, np.linalg.norm(now, axis=2, keepdims=True))
        lost = now
    shifted = _shifted(M, best, Vh)
    # Rows may share a scale, so the best shift of each row alone need not be the best for all rows. Check the result.
    error = trip(shifted) - M
    return shifted if _weighed(error, error @ V).sum() < nearest.sum() else merged


def _weighed(error: Array, along: Array) -> Array:
    """Return the squared error of each row, `[experts, rows, 1]`; errors along the directions count `OFTEN` times.

    Args:
        error: the error of the packed weights, `[experts, outputs, inputs]`.
        along: the error's components along the directions, `[experts, outputs, k]`.
    """
    import numpy as np

    whole, part = (np.einsum("eij,eij->ei", each, each)[..., None] for each in (error, along))
    weighed: Array = whole + (OFTEN - 1) * part
    return weighed


def _shifted(M: Array, C: Array, Vh: Array) -> Array:
    """Return M + C V^T in float32; compute in float64, so that the order of summation hardly changes the result."""
    import numpy as np

    shifted: Array = (M + C @ Vh).astype(np.float32)
    return shifted


COLUMNS = 16
"""The smallest number of columns in a block."""

BLOCKS = 96
"""The largest number of blocks of a weight; the weight is packed twice for each block."""

DAMPING = 0.01
"""This multiple of the mean of H's diagonal is added to the diagonal. H must be invertible, but texts do not activate
all directions.
"""

ADAPTER = 10.0
"""This multiple of the mean of H's diagonal is added to H along each direction to which the adapter responds."""


def weighting(inputs: Array, directions: Array) -> Array:
    """Return H `[width, width]`, float64: the mean of `x x^T` over the inputs x, plus `DAMPING` and `ADAPTER` terms.

    Args:
        inputs: activations, `[tokens, width]`, float64.
        directions: the directions to which the adapter responds, `[k, width]`, orthonormal rows.
    """
    import numpy as np

    H = inputs.T @ inputs / len(inputs)
    mean = float(np.trace(H)) / len(H) or 1.0
    weights: Array = H + mean * (ADAPTER * directions.T @ directions + DAMPING * np.eye(len(H)))
    return weights


def swept(trip: Callable[[Array], Array], merged: Array, H: Array) -> Array:
    """Adjust a merged weight, so that after packing, its outputs for recorded activations have a smaller error.

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
    refined = _refined(trip, merged, H, _once(trip, merged, H, step), step)
    nearest = _lost(trip(merged) - merged, H).sum()
    return refined if np.sum(_lost(trip(refined) - merged, H)) < nearest else merged


def _once(trip: Callable[[Array], Array], merged: Array, H: Array, step: int) -> Array:
    """Round the blocks of columns one after another; after each block, change the remaining columns to compensate."""
    import numpy as np

    # Round the columns with the largest activations first, while many columns are left to compensate for their errors.
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
    """Round each block again to compensate for the errors of the other blocks; keep only rows whose error decreases.

    The first round cannot know the final errors: if a scale changes later, all elements with this scale are rounded
    again.
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
        # `slope` is E H for the rounding error E. With most schemes, only a few groups of columns change. Update E H
        # from these columns only, because computing E H of the whole weight would take most of the time.
        moved = (again - packed).astype(np.float64)
        columns = np.flatnonzero(moved.any(0))
        moved = moved[:, columns]
        gain = np.einsum("ij,ij->i", 2 * slope[:, columns] + moved @ H[np.ix_(columns, columns)], moved)
        better = gain < 0
        given[better], packed[better] = tried[better], again[better]
        slope[better] += moved[better] @ H[columns]
    return given


def _lost(error: Array, H: Array) -> Array:
    """Return the diagonal of E H E^T for the error E of a weight: the squared error of each output."""
    import numpy as np

    wide = error.astype(np.float64)
    lost: Array = np.einsum("ij,ij->i", wide @ H, wide)
    return lost
