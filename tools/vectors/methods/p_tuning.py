"""P-tuning: a network of three linear layers, and rectifiers between them."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from layers import Array


def context(E: Array, W1: Array, b1: Array, W2: Array, b2: Array, W3: Array, b3: Array) -> dict[str, Array]:
    """Token by token, layer by layer."""
    rows = []
    for token in E:
        h = np.maximum(np.einsum("hw,w->h", W1, token) + b1, 0)
        h = np.maximum(np.einsum("gh,h->g", W2, h) + b2, 0)
        rows.append(np.einsum("dh,h->d", W3, h) + b3)
    return {"embeddings": np.stack(rows)}


def cases() -> list[Case]:
    """Layers of one width, and of three."""
    return [
        contextual("p_tuning", "", E=(3, 4), W1=(4, 4), b1=(4,), W2=(4, 4), b2=(4,), W3=(4, 4), b3=(4,)),
        contextual("p_tuning", "wide", E=(2, 3), W1=(7, 3), b1=(7,), W2=(7, 7), b2=(7,), W3=(5, 7), b3=(5,)),
    ]
