"""OFT on patches of a convolution's input: every patch is turned, and all are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import IN_OUT, Case, Update
from container import numbers
from layers import Array, convolution

from methods import oft


def output(
    x: Array, layer: Callable[[Array], Array], pairs: Array, high: int = 2, wide: int = 2, **attributes: Any
) -> Array:
    """Number by number: what lies patch by patch is put back as if it lay place by place."""
    new, channels = np.zeros_like(x), x.shape[1]
    width = channels * high * wide if x.ndim == 4 else channels
    # Row p of the identity, seen as a weight, comes out as row p of M^T.
    M = oft.formula(np.eye(width), None, pairs=pairs, **attributes)[0].T
    if x.ndim == 2:
        return layer(x @ M)
    places = [(i, j) for i in range(x.shape[2] - high + 1) for j in range(x.shape[3] - wide + 1)]
    kernel = [(a, b) for a in range(high) for b in range(wide)]
    for n in range(len(x)):
        patches = [(x[n, :, i : i + high, j : j + wide].reshape(-1) @ M).reshape(channels, -1) for i, j in places]
        for c in range(channels):
            numbers_of = [patch[c][k] for patch in patches for k in range(len(kernel))]
            for k, (a, b) in enumerate(kernel):
                for place, (i, j) in enumerate(places):
                    new[n, c, i + a, j + b] += numbers_of[k * len(places) + place]
    return layer(new)


def cases() -> list[Case]:
    """Exact and in series, one block for all, patches that overlap and one that does not."""
    two: dict[str, Any] = {"weight": (3, 3, 2, 2), "bias": (3,), "x": (2, 3, 4, 5), "layer": convolution}
    return [
        Case("conv2d", updates=(_made("conv2d", 3, 4),), **two),
        Case("shared", updates=(_made("shared", 1, 3),), **two),
        Case("series", updates=(_made("series", 2, 6, terms=5),), **two),
        Case("doubled", updates=(_made("doubled", 2, 6, terms=3, doubled=True),), **two),
        Case("coft", updates=(_made("coft", 4, 3, coft=True, eps=0.5),), **two),
        Case("one_patch", (2, 1, 2, 2), (_made("one", 2, 2),), x=(1, 1, 2, 2), layer=convolution),
        Case("in_out", updates=(_made("in_out", 1, 5),), **IN_OUT),
        Case("bf16", updates=(_made("bf16", 3, 4),), dtype="BF16", **two),
    ]


def _made(seed: str, n: int, size: int, **attributes: Any) -> Update:
    return Update("oft_patches", {"pairs": numbers(f"oft_patches.{seed}", n, size * (size - 1) // 2)}, attributes)
