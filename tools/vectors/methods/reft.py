"""ReFT: h' = h + R^T (act(S h + b) - R h) at the first and the last positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, EMBEDDING, IN_OUT, Case, Update, update
from layers import Array
from sublayers import ACTIVATIONS, with_attributes

LONG: dict[str, Any] = BIASED | {"x": (2, 6, 5)}


def output(
    x: Array, layer: Callable[[Array], Array], source: Array, projection: Array, source_bias: Array | None = None,
    suffix_source: Array | None = None, suffix_projection: Array | None = None,
    suffix_source_bias: Array | None = None, prefix_positions: int = 3, suffix_positions: int = 0,
    subtract_projection: bool = True, non_linearity: str = "linear", orthogonality: bool = False,
) -> Array:  # fmt: skip
    """The layer's output, some positions of it edited."""
    y = layer(x).copy()
    length = y.shape[-2]
    if suffix_source is None:
        suffix_source, suffix_source_bias, suffix_projection = source, source_bias, projection
    for position in range(length):
        if position >= length - suffix_positions:
            S, b, R = suffix_source, suffix_source_bias, suffix_projection
        elif position < prefix_positions:
            S, b, R = source, source_bias, projection
        else:
            continue
        assert R is not None
        R = _gram_schmidt(R) if orthogonality else R
        h = y[..., position, :]
        told = ACTIVATIONS[non_linearity](h @ S.T + (0 if b is None else b))
        y[..., position, :] = h + (told - h @ R.T if subtract_projection else told) @ R
    return y


def _gram_schmidt(R: Array) -> Array:
    rows: list[Array] = []
    for row in R:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / np.sqrt(row @ row))
    return np.stack(rows)


def cases() -> list[Case]:
    """The three papers' forms, tied and untied, positions that overlap or reach past the ends."""
    return [
        Case("loreft", updates=(_update("loreft", orthogonality=True),), **LONG),
        Case("noreft", updates=(_update("noreft"),), **LONG),
        Case("direft", updates=(_update("direft", subtract_projection=False, non_linearity="relu"),), **LONG),
        Case("no_bias", updates=(_update("no_bias", biased=False, prefix_positions=1),), **LONG),
        Case("tied", updates=(_update("tied", prefix_positions=1, suffix_positions=2),), **LONG),
        Case("untied", updates=(_update("untied", own=True, suffix_positions=1, orthogonality=True),), **LONG),
        Case("untied_no_bias", updates=(_update("unbiased", own=True, biased=False, suffix_positions=1),), **LONG),
        Case("overlap", updates=(_update("overlap", own=True, prefix_positions=4, suffix_positions=4),), **LONG),
        Case("short", updates=(_update("short", own=True, prefix_positions=9),), **LONG),
        Case("all_last", updates=(_update("all_last", prefix_positions=0, suffix_positions=9),), **LONG),
        Case("in_out", updates=(_update("in_out"),), **(IN_OUT | {"x": (2, 6, 5)})),
        Case("embedding", updates=(_update("embedding", prefix_positions=2),), **EMBEDDING),
        Case("bf16", updates=(_update("bf16"),), dtype="BF16", **LONG),
    ]  # fmt: skip


def _update(seed: str, own: bool = False, biased: bool = True, **attributes: Any) -> Update:
    shapes: dict[str, tuple[int, ...]] = {"source": (2, 3), "projection": (2, 3)}
    shapes |= {"source_bias": (2,)} if biased else {}
    shapes |= {f"suffix_{name}": shape for name, shape in shapes.items()} if own else {}
    return with_attributes(update("reft", f"reft.{seed}", **shapes), **attributes)
