"""Invertible adapters: an additive coupling block on the output, or its inverse on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, EMBEDDING, IN_OUT, Case, Update, update
from layers import Array
from sublayers import ACTIVATIONS, with_attributes


def output(
    x: Array, layer: Callable[[Array], Array], F_down: Array, F_down_bias: Array, F_up: Array, F_up_bias: Array,
    G_down: Array, G_down_bias: Array, G_up: Array, G_up_bias: Array, non_linearity: str = "relu",
    reverse: bool = False,
) -> Array:  # fmt: skip
    """The layer's output through the block, or its output for the input that the block would have made into x."""
    act, first = ACTIVATIONS[non_linearity], len(F_up)

    def f(h: Array) -> Array:
        return act(h @ F_down.T + F_down_bias) @ F_up.T + F_up_bias

    def g(h: Array) -> Array:
        return act(h @ G_down.T + G_down_bias) @ G_up.T + G_up_bias

    if reverse:
        z2 = x[..., first:] - g(x[..., :first])
        return layer(np.concatenate([x[..., :first] - f(z2), z2], axis=-1))
    y = layer(x)
    y1 = y[..., :first] + f(y[..., first:])
    return np.concatenate([y1, y[..., first:] + g(y1)], axis=-1)


def cases() -> list[Case]:
    """Behind layers and embeddings, and before a head."""
    return [
        Case("embedding", updates=(_update("embedding", 3),), **EMBEDDING),
        Case("linear", updates=(_update("linear", 3, non_linearity="swish"),), **BIASED),
        Case("even", updates=(_update("even", 4),), weight=(4, 5)),
        Case("in_out", updates=(_update("in_out", 3),), **IN_OUT),
        Case("head", updates=(_update("head", 5, reverse=True),), **BIASED),
        Case("bf16", updates=(_update("bf16", 3),), dtype="BF16", **BIASED),
    ]


def _update(seed: str, channels: int, a: int = 2, b: int = 1, **attributes: Any) -> Update:
    first, second = channels // 2, channels - channels // 2
    shapes: dict[str, tuple[int, ...]] = {
        "F_down": (a, second), "F_down_bias": (a,), "F_up": (first, a), "F_up_bias": (first,),
        "G_down": (b, first), "G_down_bias": (b,), "G_up": (second, b), "G_up_bias": (second,),
    }  # fmt: skip
    return with_attributes(update("invertible", f"invertible.{seed}", **shapes), **attributes)
