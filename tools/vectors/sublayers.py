"""What bottleneck adapters do around their own change, in float64 numpy, written from AdapterHub's documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, Update, update
from layers import Array

SHAPES: dict[str, tuple[int, ...]] = {
    "gate": (1, 3), "gate_bias": (1,), "norm_before": (3,), "norm_before_bias": (3,), "norm_after": (3,),
    "norm_after_bias": (3,), "scaling_factor": (1,), "channel_scaling": (3,),
}  # fmt: skip
"""The fields of every bottleneck, for three channels."""

GATED: dict[str, Any] = BIASED | {"x": (2, 4, 5)}
"""Two rows of four places: a gate is one number a row."""

SQUARE: dict[str, Any] = {"weight": (3, 3), "bias": (3,), "x": (2, 3)}
"""A layer whose input another may read beside it."""

BESIDE: dict[str, tuple[int, ...]] = {"added": (2, 3), "norm_weight": (3,), "norm_bias": (3,)}
"""A sub-layer that ends in norm(hidden + residual)."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x),
    "gelu_new": lambda x: x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.maximum(x, x / 100),
    "linear": lambda x: x,
}
"""As their definitions have them."""


def normed(x: Array, weight: Array, bias: Array) -> Array:
    """Layer normalisation over the last axis."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def sublayer(
    change: Callable[[Array], Array],
    x: Array,
    hidden: Array,
    added: Array | None = None,
    norm_weight: Array | None = None,
    norm_bias: Array | None = None,
    gate: Array | None = None,
    gate_bias: Array | None = None,
    norm_before: Array | None = None,
    norm_before_bias: Array | None = None,
    norm_after: Array | None = None,
    norm_after_bias: Array | None = None,
    scaling_factor: Array | None = None,
    channel_scaling: Array | None = None,
    scaling: float = 1.0,
    parallel: bool = False,
    original_ln_before: bool = False,
    original_ln_after: bool = True,
    residual_before_ln: str = "true",
    adapter_residual_before_ln: bool = False,
    **_where: str,
) -> Array:
    """The sub-layer's output with a bottleneck that computes `change`; `added` is its residual."""

    def total(h: Array) -> Array:
        return h if added is None else h + added

    def closed(h: Array) -> Array:
        return total(h) if norm_weight is None else normed(total(h), norm_weight, norm_bias)

    def adapted(h: Array) -> Array:
        y = change(h if norm_before is None else normed(h, norm_before, norm_before_bias)) * scaling
        y = y if scaling_factor is None else y * scaling_factor[0]
        y = y if channel_scaling is None else y * channel_scaling
        if gate is None:
            return y
        logits = h @ gate[0] + (0 if gate_bias is None else gate_bias[0])
        share = 1 / (1 + np.exp(-logits))
        return y * (share.mean(1)[:, None, None] if h.ndim == 3 else share[:, None])

    def after(h: Array) -> Array:
        return h if norm_after is None else normed(h, norm_after, norm_after_bias)

    if parallel:
        new = hidden + after(adapted(x if added is None else added))
    else:
        read = closed(hidden) if original_ln_before else hidden
        past = {"true": hidden, "false": read, "post_add": total(hidden) if original_ln_before else hidden}
        skip = past[residual_before_ln]
        new = after(adapted(read) + skip) if adapter_residual_before_ln else after(adapted(read)) + skip
    return closed(new) if original_ln_after else new


def with_attributes(made: Update, **attributes: Any) -> Update:
    """The update with attributes."""
    return Update(made.method, made.tensors, made.attributes | attributes)


def made(method: str, seed: str, fields: dict[str, tuple[int, ...]], names: str, **attributes: Any) -> Update:
    """An update of a method's own fields, and of shared ones by name."""
    shapes = fields | {name: SHAPES[name] for name in names.split()}
    return with_attributes(update(method, seed, **shapes), **attributes)
