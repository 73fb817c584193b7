"""Poly: y' = y + B A x / r, A and B mixed from skills by each row's task, split by split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import Case, Update, update
from layers import Array

WIDE: dict[str, Any] = {"weight": (4, 6), "bias": (4,), "x": (3, 2, 6)}
TASKS = np.array([1, 0, 1])


def output(x: Array, layer: Callable[[Array], Array], task_ids: Array, A: Array, B: Array, logits: Array) -> Array:
    """Row by row: the splits of x's channels each have a mix of their own, and so have those of y's."""
    y = layer(x).copy()
    splits, skills, wide, r = A.shape
    out = B.shape[3]
    for row, task in enumerate(task_ids):
        gates = 1 / (1 + np.exp(-logits[task].reshape(splits, skills)))
        inner = 0
        for split in range(splits):
            shares = gates[split] / (gates[split].sum() + 1e-12)
            mix = sum(shares[skill] * A[split, skill] for skill in range(skills))
            inner = inner + x[row][..., split * wide : (split + 1) * wide] @ mix
        for split in range(splits):
            shares = gates[split] / (gates[split].sum() + 1e-12)
            mix = sum(shares[skill] * B[split, skill] for skill in range(skills))
            y[row][..., split * out : (split + 1) * out] += inner @ mix / r
    return y


def cases() -> list[Case]:
    """One split and two, rows of one place and of several, both layouts."""
    turned = WIDE | {"weight": (6, 4), "layout": "in out *k"}
    return [
        Case("one_split", updates=(_update("one_split", 1),), call={"task_ids": TASKS}, **WIDE),
        Case("two_splits", updates=(_update("two_splits", 2),), call={"task_ids": TASKS}, **WIDE),
        Case("single_places", updates=(_update("single", 2),), call={"task_ids": TASKS}, **(WIDE | {"x": (3, 6)})),
        Case("in_out", updates=(_update("in_out", 2),), call={"task_ids": TASKS}, **turned),
        Case("bf16", updates=(_update("bf16", 1),), call={"task_ids": TASKS}, dtype="BF16", **WIDE),
    ]


def _update(seed: str, splits: int) -> Update:
    A, B = (splits, 3, 6 // splits, 2), (splits, 3, 2, 4 // splits)
    return update("poly", f"poly.{seed}", A=A, B=B, logits=(2, splits * 3))
