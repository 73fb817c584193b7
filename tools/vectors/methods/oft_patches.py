"""OFT on patches of a convolution's input: every patch is turned, and all are added up where they were taken from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import Case, Update
from container import numbers
from layers import Array, convolution

from methods import oft


def output(
    x: Array, layer: Callable[[Array], Array], pairs: Array, high: int = 2, wide: int = 2, **attributes: Any
) -> Array:
    """Patch by patch; the kernel is the largest square that the numbers of a patch make with x's channels."""
    new, channels = np.zeros_like(x), x.shape[1]
    width = channels * high * wide
    # Row p of the identity, seen as a weight, comes out as row p of M^T.
    M = oft.formula(np.eye(width), None, pairs=pairs, **attributes)[0].T
    for i in range(x.shape[2] - high + 1):
        for j in range(x.shape[3] - wide + 1):
            patch = x[:, :, i : i + high, j : j + wide]
            new[:, :, i : i + high, j : j + wide] += (patch.reshape(len(x), -1) @ M).reshape(patch.shape)
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
        Case("bf16", updates=(_made("bf16", 3, 4),), dtype="BF16", **two),
    ]


def _made(seed: str, n: int, size: int, **attributes: Any) -> Update:
    return Update("oft_patches", {"pairs": numbers(f"oft_patches.{seed}", n, size * (size - 1) // 2)}, attributes)
