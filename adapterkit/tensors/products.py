"""Products of small factors, for numpy and torch: W += scale * B @ A in place, Kronecker's, the Tucker form of a kernel."""

from __future__ import annotations

import math
import threading
from typing import Any

TILES = (256, 192, 128, 64)
"""Columns computed at a time: OpenBLAS takes half the time a number where the product stays in a core's cache."""


def add_product(W: Any, B: Any, A: Any, scale: float) -> None:
    """W `[m, n]` += scale * B `[m, r]` @ A `[r, n]`, in place, in W's dtype; W may be a transposed view."""
    if hasattr(W, "addmm_"):
        W.addmm_(B, A, alpha=scale)
    elif not W.flags.c_contiguous and W.T.flags.c_contiguous:
        _add_tiled(W.T, scale * A.T, B.T)
    else:
        _add_tiled(W, scale * B, A)


def tucker(core: Any, a: Any, inputs: Any) -> Any:
    """sum_ij core[i, j, *k] a[o, i] inputs[j, n] as `[out, in * k]`."""
    r = len(core)
    inner = (core.reshape(r, r, -1).swapaxes(1, 2) @ inputs).swapaxes(1, 2)
    return a @ inner.reshape(r, -1)


def kron(w1: Any, w2: Any) -> Any:
    """The Kronecker product of `[a, c]` and `[b, d]`, `[a * b, c * d]`."""
    return (w1[:, None, :, None] * w2[None, :, None, :]).reshape(len(w1) * len(w2), -1)


def even_split(size: int, factor: int = -1) -> tuple[int, int]:
    """The two numbers into which LyCORIS splits a side of a weight, the one for w1 first.

    Args:
        size: their product.
        factor: the first, where it divides; else the first is the largest number up to it that makes it the smaller of
            the two. -1 for no limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = next((n for n in range(limit, 0, -1) if size % n == 0), 1)
    return small, size // small


def _add_tiled(W: Any, B: Any, A: Any) -> None:
    rows, columns = W.shape
    tile = next((tile for tile in TILES if columns % tile == 0), None)
    if tile is None or not W.flags.c_contiguous:
        W += B @ A
        return
    from numpy import matmul

    tiles = _scratch(W, (columns // tile, rows, tile))
    matmul(B, A.reshape(len(A), columns // tile, tile).swapaxes(0, 1), out=tiles)
    in_place = W.reshape(rows, columns // tile, tile)
    in_place += tiles.swapaxes(0, 1)


_held = threading.local()


def _scratch(like: Any, shape: tuple[int, ...]) -> Any:
    """Memory of this thread for a product: the first touch of fresh memory costs more than the arithmetic."""
    import numpy as np

    size = math.prod(shape)
    held = getattr(_held, "memory", None)
    if held is None or held.size < size or held.dtype != like.dtype:
        held = _held.memory = np.empty(size, like.dtype)
    return held[:size].reshape(shape)
