"""Products of small factors for numpy and torch: B @ A, written to an existing array; Kronecker and Tucker products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from .namespace import N, namespace

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array

ROWS = 16
"""The number of rows that one call of OpenBLAS computes. It is small so that the rows stay in a core's cache."""

STRIP = 3 << 14
"""The number of elements in a group of A's columns. The group stays in the cache while all of B is multiplied by it."""


def product(D: N, B: N, A: N) -> None:
    """Compute D `[m, n]` = B `[m, r]` @ A `[r, n]` in place; D may be a transposed view."""
    if hasattr(D, "copy_"):
        cast("torch.Tensor", D).copy_(cast("torch.Tensor", B @ A))
        return
    out, left, right = cast("tuple[Array, Array, Array]", (D, B, A))
    if not out.flags.c_contiguous and out.T.flags.c_contiguous:
        _product(out.T, right.T, left.T)
    else:
        _product(out, left, right)


def tucker(core: N, a: N, inputs: N) -> N:
    """Return `sum_ij core[i, j, *k] * a[o, i] * inputs[j, n]` as a matrix `[out, in * k]`, indexed by o and (n, k)."""
    return a @ contracted(core, inputs)


def contracted(core: N, inputs: N) -> N:
    """Return `sum_j core[i, j, *k] * inputs[j, n]` as a matrix `[r, in * k]`, indexed by i and (n, k)."""
    r = len(core)
    inner = (core.reshape((r, r, -1)).swapaxes(1, 2) @ inputs).swapaxes(1, 2)
    return inner.reshape((r, -1))


def kron(w1: N, w2: N) -> N:
    """Return the Kronecker product `[a * b, c * d]` of w1 `[a, c]` and w2 `[b, d]`."""
    return (w1[:, None, :, None] * w2[None, :, None, :]).reshape((len(w1) * len(w2), -1))


def sides(left: N | None, right: N | None, whole: N | None) -> tuple[N, N]:
    """Return two factors of a matrix: `left` and `right` if `whole` is None, else `whole` and an identity matrix."""
    if whole is None:
        assert left is not None
        assert right is not None
        return left, right
    xp, (rows, columns) = namespace(whole), whole.shape
    identity = xp.eye(min(rows, columns), dtype=whole.dtype, device=getattr(whole, "device", None))
    return (identity, whole) if rows < columns else (whole, identity)


def even_split(size: int, factor: int = -1) -> tuple[int, int]:
    """Factor the length of a weight's axis into the axis lengths of the Kronecker factors w1 and w2, as LyCORIS does.

    Args:
        size: the length of the weight's axis.
        factor: the wanted length of w1's axis. If `factor` does not divide `size`, w1's length is the largest divisor
            of `size` that exceeds neither `factor` nor w2's length. A `factor` of -1 means no limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = next((n for n in range(limit, 0, -1) if size % n == 0), 1)
    return small, size // small


def _product(D: Array, B: Array, A: Array) -> None:
    from numpy import matmul

    m, n = D.shape
    if m % ROWS or not D.flags.c_contiguous:
        matmul(B, A, out=D)
        return
    D, B, step = D.reshape(-1, ROWS, n), B.reshape(-1, ROWS, len(A)), max(ROWS, STRIP // max(len(A), 1))
    for start in range(0, n, step):
        matmul(B, A[:, start : start + step], out=D[:, :, start : start + step])
