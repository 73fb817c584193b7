"""RoAd: W' = R W and b' = R b, R turning and scaling outputs in pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from building import CONV2D, EMBEDDING, EXPERTS, IN_OUT, Case, Pair, Update, update
from layers import Array


def formula(W: Array, b: Array | None, theta: Array, alpha: Array, variant: int = 1, group: int = 2) -> Pair:
    """R as a whole matrix, entry by entry."""
    R, half = np.zeros((len(W), len(W))), group // 2
    for o in range(len(W)):
        which, inside = divmod(o, group)
        partner = o + half if inside < half else o - half
        first, second = _places(which, inside, half, variant)
        R[o, o] = alpha[first] * math.cos(theta[first])
        R[o, partner] = (-1 if inside < half else 1) * alpha[second] * math.sin(theta[second])
    return np.einsum("op,p...->o...", R, W), None if b is None else np.einsum("op,p->o", R, b)


def _places(group: int, inside: int, half: int, variant: int) -> tuple[int, int]:
    """Where an output's own and its partner's angle are."""
    if variant == 1:
        return (group * half + inside % half,) * 2
    if variant == 2:
        return (group * 2 * half + inside,) * 2
    return group * 4 * half + inside, group * 4 * half + 2 * half + inside


def cases() -> list[Case]:
    """All variants, groups of two and of more, with and without a bias."""
    stack = update("road", "road.e", theta=(2, 2), alpha=(2, 2))
    four: dict[str, Any] = {"weight": (4, 5), "bias": (4,)}
    return [
        Case("linear", updates=(_road("road.linear", 2),), **four),
        Case("variant1", updates=(_road("road.v1", 4, variant=1, group=4),), weight=(8, 3), bias=(8,), x=(2, 3)),
        Case("variant2", updates=(_road("road.v2", 8, variant=2, group=4),), weight=(8, 3), bias=(8,), x=(2, 3)),
        Case("variant4", updates=(_road("road.v4", 16, variant=4, group=4),), weight=(8, 3), bias=(8,), x=(2, 3)),
        Case("pairs2", updates=(_road("road.p2", 4, variant=2, group=2),), **four),
        Case("pairs4", updates=(_road("road.p4", 8, variant=4),), **four),
        Case("biasless", updates=(_road("road.biasless", 8, variant=4, group=4),), weight=(4, 5)),
        Case("conv2d", updates=(_road("road.conv2d", 2),), **CONV2D | {"weight": (4, 2, 2, 3), "bias": (4,)}),
        Case("in_out", updates=(_road("road.in_out", 2, group=4),), **IN_OUT | {"weight": (5, 4), "bias": (4,)}),
        Case("embedding", updates=(_road("road.embedding", 4, variant=2),), **EMBEDDING | {"weight": (6, 4)}),
        Case("experts", updates=(stack,), **EXPERTS | {"weight": (2, 4, 5)}),
        Case("fused", updates=(_road("road.fused", 2),), weight=(12, 5), bias=(12,), rows=(4, 8)),
        Case("bf16", updates=(_road("road.bf16", 2),), dtype="BF16", **four),
    ]  # fmt: skip


def _road(seed: str, size: int, **attributes: Any) -> Update:
    return Update("road", update("road", seed, theta=(size,), alpha=(size,)).tensors, attributes)
