"""Adjust merged weights before quantization, so that the quantized weights keep the adapter's change.

Let `W` be the base's weight, `M` the merged weight, and `D = M - W` the change. If D is smaller than a quantization
step, D is lost when each element of M is rounded to the nearest. But the elements of a row can also be rounded such
that their errors cancel in the input directions to which D responds. Let `V` be these directions: the right singular
vectors of D. The functions `kept` and `swept` call the scheme's packing function to round, so they work for every
scheme.

`kept` needs no data. It looks for the quantized matrix `Q` that is nearest to M, subject to `(Q - M) V = 0`. With
Lagrange multipliers `C`, Q is `M + C V^T` rounded to the nearest. Gradient ascent finds C, for each row separately. The
gradient is `-(Q - M) V`, the negative of the error along V. After rounding, the shift `C V^T` changes the elements of Q
by whole quantization steps. So the shift also adds errors in all other directions, and these errors add up over the
layers. Therefore each row gets the best shift that the ascent found for it: the one with the smallest squared error. In
this error, squared errors along V count `OFTEN` times as much as other squared errors. The ascent starts with a shift
of 0, which rounds M itself to the nearest.

`swept` uses recorded inputs `X` of the layer. It minimizes the error of the layer's outputs,
`tr((Q - M) H (Q - M)^T)` with `H = X^T X`. As in GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), blocks
of columns are rounded one after another. After each block, the inverse of H determines how the remaining columns change
to compensate for the block's error. To round a block, the scheme packs the whole weight. Afterwards, each block is
rounded a second time to compensate for the errors of all other blocks; a row is changed only if its error decreases.
The second pass is needed because the scale of some columns may change after one of these columns was rounded.
`weighting` increases H in the directions to which the adapter responds. Otherwise the adapter's change would be lost
first, because it is small relative to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..io.lazy import Array


DIRECTIONS = 64
"""The largest number of directions that are kept for one weight."""

SHARE = 8
"""For a weight with n inputs, at most `n / SHARE` directions are kept.

Rounding cannot make the errors cancel in more directions at the same time.
"""

WEAK = 1e-3
"""A direction is not kept if its singular value is at most this fraction of the largest singular value."""

OFTEN = 8.0
"""Squared errors along the change's directions are multiplied by this factor, and all other squared errors by 1.

This table shows which percentage of a LoRA's effect survives with each factor, measured on SmolLM2-135M in nf4:

    factor          1 (nearest)   8    16    32   no limit
    all layers             4     37    63   -81       -277
    o_proj                 4     28    62    83         84
    q_proj, v_proj         7     42   -47  -331       -555
    down_proj              2     11     1  -356       -866
"""

ROUNDS = 24
"""The largest number of steps of the gradient ascent. Each step packs the weight once."""

ENOUGH = 0.02
"""The search measures each row's error along the directions after each step. It ends when each row's smallest error so
far is at most this fraction of the row's first error.
"""

STILL, TURNED = 0.7, -0.2
"""Thresholds for a fraction: a row's error along the directions after a step, divided by this error before the step.

The fraction is 1 if the error did not change, 0 if it is gone, and negative if it changed its sign. If the fraction is
above `STILL`, the step was too short. If it is below `TURNED`, the step was too long.
"""

LONGER, SHORTER = 1.6, 0.6
"""The step is multiplied by `LONGER` if the fraction is above `STILL`, and by `SHORTER` if it is below `TURNED`."""


def directions(D: Array, seed: int) -> Array:
    """Return the input directions to which a change responds: orthonormal rows, `[k, inputs]`, float64.

    Args:
        D: the change, `[outputs, inputs]`, float64.
        seed: the seed of the random vectors in the decomposition, see `ops.sketching.dominant`.
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
        directions: `[experts, k, inputs]`, orthonormal rows for each expert. If an expert has fewer than k directions,
            the remaining rows are zero.

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
    # Rows may share a scale. Then one row's shift can increase the error of another row, so check the total error.
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
    """Return M + C V^T in float32. It is computed in float64, so that the order of summation hardly matters."""
    import numpy as np

    shifted: Array = (M + C @ Vh).astype(np.float32)
    return shifted


COLUMNS = 16
"""The smallest number of columns in a block."""

BLOCKS = 96
"""The largest number of blocks of a weight; the weight is packed twice for each block."""

DAMPING = 0.01
"""This multiple of the mean of H's diagonal is added to the diagonal. Without it, H would not be invertible if the
recorded inputs do not span all directions.
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
    """Adjust a merged weight, so that the packed weight has smaller output errors for the recorded activations.

    Args:
        trip: a function that packs a weight `[outputs, inputs]` and returns the dequantized result.
        merged: the merged weight, `[outputs, inputs]`, float32.
        H: the matrix `[inputs, inputs]` from `weighting`.

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
    """Round each block again to compensate for the errors of the other blocks.

    A row is changed only if its error decreases. The final errors of the other blocks are known only after the first
    pass. During the first pass, the rounding of a block can still change a scale, and with it the errors of all
    elements that use this scale.
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
        # from these columns only, because computing E H from all columns would take most of the time.
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
