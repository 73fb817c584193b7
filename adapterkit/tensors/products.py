"""Products of thin factors, for numpy and torch: W += scale * B @ A in place, and the Tucker form of a kernel."""

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
