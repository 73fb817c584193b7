"""Bottleneck adapters: up(act(down(h))) beside or behind a layer, a residual and a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from building import BIASED, CONV2D, EMBEDDING, IN_OUT, LINEAR, Case, Update
from layers import Array
from sublayers import ACTIVATIONS, BESIDE, GATED, SQUARE, made, sublayer


def output(
    x: Array, layer: Callable[[Array], Array], down: Array, up: Array, down_bias: Array | None = None,
    up_bias: Array | None = None, non_linearity: str = "relu", **options: Any,
) -> Array:  # fmt: skip
    """The layer's output through the adapter."""

    def change(h: Array) -> Array:
        inner = ACTIVATIONS[non_linearity](h @ down.T + (0 if down_bias is None else down_bias))
        return inner @ up.T + (0 if up_bias is None else up_bias)

    y = layer(x)
    if y.ndim == 4:  # Channels stand second behind a convolution.
        return sublayer(change, x, y.transpose(0, 2, 3, 1), **options).transpose(0, 3, 1, 2)
    return sublayer(change, x, y, **options)


def cases() -> list[Case]:
    """Every option, on plain layers and beside a residual with and without a norm."""
    add = {"added": BESIDE["added"]}
    options: dict[str, dict[str, Any]] = {
        "houlsby": {"non_linearity": "swish", "original_ln_before": False, "original_ln_after": True},
        "pfeiffer": {"original_ln_before": True},
        "post_add": {"original_ln_before": True, "residual_before_ln": "post_add"},
        "past_the_norm": {"original_ln_before": True, "residual_before_ln": "false"},
        "adapter_plus": {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": "false"},
        "bare": {"original_ln_after": False},
        "parallel": {"parallel": True, "scaling": 4.0},
        "parallel_bare": {"parallel": True, "original_ln_after": False},
    }  # fmt: skip
    after = "norm_after norm_after_bias"
    sibling = _plain("sibling", original_ln_before=True, residual="first", norm="last")
    return [
        Case("linear", updates=(_plain("linear"),), **BIASED),
        Case("defaults", updates=(_plain("defaults"),), **LINEAR),
        Case("scaled", updates=(_plain("scaled", "scaling_factor", scaling=0.5),), **BIASED),
        Case("channels", updates=(_plain("channels", "channel_scaling", non_linearity="gelu"),), **BIASED),
        Case("gated", updates=(_plain("gated", "gate gate_bias", non_linearity="tanh"),), **GATED),
        Case("gate_alone", updates=(_plain("gate_alone", "gate", non_linearity="leaky_relu"),), **BIASED),
        Case("norm_before", updates=(_plain("before", "norm_before norm_before_bias"),), **BIASED),
        Case("norm_after", updates=(_plain("after", after),), **BIASED),
        Case("norm_last", updates=(_plain("last", after, adapter_residual_before_ln=True),), **BIASED),
        Case("beside", updates=(_plain("beside", parallel=True, non_linearity="gelu_new"),), **SQUARE),
        Case("in_out", updates=(_plain("in_out"),), **IN_OUT),
        Case("embedding", updates=(_plain("embedding"),), **EMBEDDING),
        Case("conv2d", updates=(_plain("conv2d"),), **CONV2D),
        Case("bf16", updates=(_plain("bf16"),), dtype="BF16", **BIASED),
        *(Case(f"{n}_normed", updates=(_plain(n, **some),), beside=BESIDE, **BIASED) for n, some in options.items()),
        *(Case(f"{n}_added", updates=(_plain(n, **some),), beside=add, **BIASED) for n, some in options.items()),
        Case("sibling", updates=(sibling,), beside=BESIDE, **BIASED),
    ]


def _plain(seed: str, names: str = "", **attributes: Any) -> Update:
    fields: dict[str, tuple[int, ...]] = {"down": (2, 3), "up": (3, 2)}
    if seed != "defaults":
        fields |= {"down_bias": (2,), "up_bias": (3,)}
    return made("bottleneck", f"bottleneck.{seed}", fields, names, **attributes)
