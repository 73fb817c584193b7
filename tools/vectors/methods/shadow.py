"""Shadow: the input leans on where it differs from the state of a network beside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, Case, Update, update
from container import numbers
from layers import Array

STATE = numbers("shadow.state", 2, 3, 5)


def output(
    x: Array, layer: Callable[[Array], Array], shadow: Array, down: Array, up: Array, alpha: float = 0.1, **_: Any
) -> Array:
    """Place by place; what the block makes of the state is read by the next block alone."""
    leaning = x.copy()
    for at in np.ndindex(*x.shape[:-1]):
        leaning[at] += alpha * (up @ (down @ (x[at] - shadow[at])))
    return layer(leaning)


def cases() -> list[Case]:
    """Two ranks, both types of numbers, with and without a projection of the network's output."""
    called: dict[str, Any] = BIASED | {"weight": (5, 5), "bias": (5,), "x": (2, 3, 5), "call": {"shadow": STATE}}
    return [
        Case("block", updates=(_made("block", alpha=0.5),), **called),
        Case("defaults", updates=(_made("defaults", r=1, names=""),), **called),
        Case("in_out", updates=(_made("in_out"),), **called | {"layout": "in out *k"}),
        Case("projected", updates=(_made("projected", projection=(5, 4), alpha=-0.75, heads=2, inner=3),), **called),
        Case("bf16", updates=(_made("bf16", shared_embeddings=False, layers=2),), dtype="BF16", **called),
    ]


def _made(
    seed: str, r: int = 2, m: int = 3, projection: tuple[int, ...] | None = None, names: str = "a.weight 2 2\nb.bias 2",
    **attributes: Any,
) -> Update:  # fmt: skip
    shapes = {"down": (r, 5), "up": (5, r), "network": (6,)} | ({"projection": projection} if projection else {})
    for part in ("transform", "gate"):
        ends = {"in": (m, 5), "in_bias": (m,), "out": (5, m), "out_bias": (5,)}
        shapes |= {f"{part}_{end}": shape for end, shape in ends.items()}
    made = update("shadow", f"shadow.{seed}", **shapes)
    return Update(made.method, made.tensors, attributes | ({"names": names} if names else {}))
