"""Prefix: keys and values of each layer."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from layers import Array


def context(P: Array, step: int = 1) -> dict[str, Array]:
    """Layer by layer."""
    return {"past": np.stack([P[(layer * step) % len(P)] for layer in range(len(P))])}


def cases() -> list[Case]:
    """The whole model and a part of it; pairs that are taken two by two."""
    return [
        contextual("prefix", "", P=(2, 2, 3, 4, 5)),
        contextual("prefix", "two", attributes={"step": 2}, P=(3, 2, 1, 2, 4)),
        contextual("prefix", "even", attributes={"step": 2}, P=(4, 2, 1, 1, 3)),
        contextual("prefix", "bf16", dtype="BF16", P=(1, 2, 2, 3, 4)),
    ]
