"""LoRA across the groups of a convolution: y' = y + scaling * (B in groups of A over all channels, and a bias)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from building import IN_OUT, Case, Update, update
from layers import Array, convolution


def output(
    x: Array,
    layer: Callable[[Array], Array],
    A: Array,
    B: Array,
    bias: Array | None = None,
    scaling: float = 1.0,
    zero_padded: bool = False,  # noqa: ARG001 - layers of vectors pad nothing
) -> Array:
    """Output by output: each reads its own group's share of what A gives."""
    y, h, share = layer(x).copy(), convolution(x, A), B.shape[1]
    high = len(B) // (len(A) // share)
    for o in range(len(B)):
        own = h[:, o // high * share :][:, :share]
        y[:, o] += scaling * (np.einsum("ns...,s->n...", own, B[o]) + (0 if bias is None else bias[o]))
    return y


def cases() -> list[Case]:
    """One, two and three kernel axes; two groups, as many as channels, and a linear layer, which has one."""
    two: dict[str, Any] = {"weight": (4, 3, 2, 3), "bias": (4,), "x": (1, 6, 4, 5), "layer": convolution}
    wide, one = {"A": (4, 6, 2, 3), "B": (4, 2)}, {"layer": convolution}
    return [
        Case("conv2d", updates=(_made("conv2d", **wide),), **two),
        Case("default_scaling", updates=(_made("default", scaling=None, A=(2, 6, 2, 3), B=(4, 1)),), **two),
        Case("biased", updates=(_made("biased", scaling=-1.5, **wide, bias=(4,)),), **two),
        Case("zero_padded", updates=(_made("zero_padded", **wide, zero_padded=True),), **two),
        Case("conv1d", (6, 2, 3), (_made("conv1d", A=(2, 4, 3), B=(6, 1)),), x=(2, 4, 5), **one),
        Case("depthwise", (3, 1, 2, 2), (_made("depthwise", A=(6, 3, 2, 2), B=(3, 2)),), x=(1, 3, 3, 4), **one),
        Case("conv3d", (2, 2, 2, 1, 2), (_made("conv3d", A=(2, 4, 2, 1, 2), B=(2, 1)),), x=(1, 4, 3, 2, 3), **one),
        Case("in_out", updates=(_made("in_out", A=(2, 5), B=(3, 2)),), **IN_OUT),
        Case("bf16", updates=(_made("bf16", **wide),), dtype="BF16", **two),
    ]


def _made(seed: str, scaling: float | None = 0.5, zero_padded: bool = False, **shapes: tuple[int, ...]) -> Update:
    made = update("grouped_lora", f"grouped_lora.{seed}", scaling, **shapes)
    return replace(made, attributes=made.attributes | {"zero_padded": True}) if zero_padded else made
