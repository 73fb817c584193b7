"""Lily: y' = y + scaling * (sum over e of share_e B_e)^T A x; one set of shares for a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, IN_OUT, LINEAR, Case, Update, update
from layers import Array

LONG: dict[str, Any] = BIASED | {"x": (2, 3, 5)}


def output(x: Array, layer: Callable[[Array], Array], A: Array, B: Array, router: Array, scaling: float = 1.0) -> Array:
    """Place by place, after the shares of all places were averaged."""
    y, places = layer(x), x.reshape(-1, x.shape[-1])
    told = []
    for place in places:
        powers = np.exp(router @ (A @ place))
        told.append(powers / powers.sum())
    shares = np.mean(told, axis=0)
    change = [sum(shares[e] * (B[e].T @ (A @ place)) for e in range(len(B))) for place in places]
    return y + scaling * np.stack(change).reshape(y.shape)


def cases() -> list[Case]:
    """Rows of one place and of several, two experts and three, both layouts."""
    return [
        Case("sequence", updates=(_update("sequence", scaling=0.5),), **LONG),
        Case("default_scaling", updates=(_update("default_scaling"),), **LONG),
        Case("single_places", updates=(_update("single", experts=3),), **LINEAR),
        Case("in_out", updates=(_update("in_out"),), **IN_OUT),
        Case("bf16", updates=(_update("bf16"),), dtype="BF16", **LONG),
    ]


def _update(seed: str, experts: int = 2, scaling: float | None = None) -> Update:
    return update("lily", f"lily.{seed}", scaling, A=(2, 5), B=(experts, 2, 3), router=(experts, 2))
