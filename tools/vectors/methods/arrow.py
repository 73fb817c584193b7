"""Arrow: y' = y + sum of the best experts' low-rank changes, by likeness of each place to their prototypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, IN_OUT, LINEAR, Case, Update, update
from layers import Array

LONG: dict[str, Any] = BIASED | {"x": (2, 3, 5)}


def output(
    x: Array, layer: Callable[[Array], Array], A: Array | None = None, B: Array | None = None,
    prototypes: Array | None = None, strengths: Array | None = None, top_k: int = 1, temperature: float = 1.0,
    scaling: float = 1.0, **_router: Any,
) -> Array | None:  # fmt: skip
    """Place by place; nothing without the experts."""
    if A is None or B is None or prototypes is None or strengths is None:
        return None
    y = layer(x).copy()
    for at in np.ndindex(*x.shape[:-1]):
        likeness = [abs(float(prototype @ x[at])) for prototype in prototypes]
        chosen = sorted(range(len(A)), key=lambda e: -likeness[e])[:top_k]
        powers = {e: np.exp(likeness[e] / temperature) for e in chosen}
        for e in chosen:
            share = powers[e] / sum(powers.values())
            y[at] += scaling * share * strengths[e] * (B[e] @ (A[e] @ x[at]))
    return y


def cases() -> list[Case]:
    """One expert and several a place, both layouts, and a router's own file, whose experts are elsewhere."""
    counts = {"tasks": 4, "general": 2}
    idle = update("arrow", "arrow.router", idle_A=(2, 5), idle_B=(3, 2))
    return [
        Case("best", updates=(_update("best"),), **LONG),
        Case("two_best", updates=(_update("two", top_k=2, temperature=0.5, scaling=0.5, **counts),), **LONG),
        Case("all", updates=(_update("all", top_k=3),), **LINEAR),
        Case("in_out", updates=(_update("in_out", top_k=2),), **IN_OUT),
        Case("router", updates=(Update("arrow", idle.tensors, counts | {"top_k": 2}),), **LONG),
        Case("bf16", updates=(_update("bf16", top_k=2),), dtype="BF16", **LONG),
    ]


def _update(seed: str, **attributes: Any) -> Update:
    shapes = {"A": (3, 2, 5), "B": (3, 3, 2), "prototypes": (3, 5), "strengths": (3,)}
    made = update("arrow", f"arrow.{seed}", **shapes)
    return Update(made.method, made.tensors, attributes)
