"""LoRA behind a gate: y' = y + mean over places of sigmoid(gate x + gate_bias), times B A x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, IN_OUT, LINEAR, Case, Update, update
from layers import Array

LONG: dict[str, Any] = BIASED | {"x": (2, 4, 5)}


def output(x: Array, layer: Callable[[Array], Array], A: Array, B: Array, gate: Array, gate_bias: Array) -> Array:
    """Row by row, place by place."""
    y = layer(x).copy()
    for row, out in zip(x, y, strict=True):
        places = row.reshape(-1, row.shape[-1])
        share = np.mean([1 / (1 + np.exp(-(gate[0] @ place + gate_bias[0]))) for place in places])
        out += share * np.einsum("or,ri,...i->...o", B, A, row)
    return y


def cases() -> list[Case]:
    """Rows of one place and of several, and both layouts of a linear layer."""
    return [
        Case("sequence", updates=(_update("sequence"),), **LONG),
        Case("single", updates=(_update("single"),), **LINEAR),
        Case("in_out", updates=(_update("in_out"),), **IN_OUT),
    ]


def _update(seed: str) -> Update:
    return update("gated_lora", f"gated_lora.{seed}", A=(2, 5), B=(3, 2), gate=(1, 5), gate_bias=(1,))
