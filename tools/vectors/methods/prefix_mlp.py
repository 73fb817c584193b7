"""Prefix with its network: keys and values that two linear layers compute."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from layers import Array


def context(E: Array, W1: Array, b1: Array, W2: Array, b2: Array) -> dict[str, Array]:
    """Token by token, layer by layer, head by head."""
    layers, _, heads, d = b2.shape
    past = np.empty((layers, 2, heads, len(E), d))
    for layer, kind, head, token in np.ndindex(*past.shape[:4]):
        h = np.tanh(np.einsum("hw,w->h", W1, E[token]) + b1)
        past[layer, kind, head, token] = np.einsum("dh,h->d", W2[layer, kind, head], h) + b2[layer, kind, head]
    return {"past": past}


def cases() -> list[Case]:
    """One layer and one head; two layers of three heads."""
    return [
        contextual("prefix_mlp", "", E=(3, 4), W1=(5, 4), b1=(5,), W2=(1, 2, 1, 4, 5), b2=(1, 2, 1, 4)),
        contextual("prefix_mlp", "many", E=(2, 4), W1=(5, 4), b1=(5,), W2=(2, 2, 3, 2, 5), b2=(2, 2, 3, 2)),
    ]
