"""P-tuning with its LSTM: token by token in both directions, layer over layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import Case, contextual
from layers import Array

KINDS = ("input", "hidden", "input_bias", "hidden_bias")


def direction(tokens: list[Array], wi: Array, wh: Array, bi: Array, bh: Array) -> list[Array]:
    """One direction's outputs, unit by unit."""
    size = wh.shape[1]
    h, c, out = np.zeros(size), np.zeros(size), []
    for token in tokens:
        before, after = h, np.zeros(size)
        for unit in range(size):
            i, f, g, o = (
                np.dot(wi[row], token) + bi[row] + np.dot(wh[row], before) + bh[row]
                for row in range(unit, 4 * size, size)
            )
            c[unit] = c[unit] / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            after[unit] = np.tanh(c[unit]) / (1 + np.exp(-o))
        h = after
        out.append(h)
    return out


def context(E: Array, W1: Array, b1: Array, W2: Array, b2: Array, **layers: Any) -> dict[str, Array]:
    """The network, token by token."""
    stack = [[layers[f"first_{kind}"] for kind in KINDS]]
    above = range(len(layers.get("deeper_input", ())))
    stack += [[layers[f"deeper_{kind}"][number] for kind in KINDS] for number in above]
    tokens = list(E)
    for layer in stack:
        ahead = direction(tokens, *(each[0] for each in layer))
        back = direction(tokens[::-1], *(each[1] for each in layer))[::-1]
        tokens = [np.concatenate(pair) for pair in zip(ahead, back, strict=True)]
    rows = [np.einsum("dh,h->d", W2, np.maximum(np.einsum("gh,h->g", W1, token) + b1, 0)) + b2 for token in tokens]
    return {"embeddings": np.stack(rows)}


def cases() -> list[Case]:
    """One layer, and three."""
    head = {"W1": (4, 4), "b1": (4,), "W2": (5, 4), "b2": (5,)}
    first = {
        "first_input": (2, 8, 3),
        "first_hidden": (2, 8, 2),
        "first_input_bias": (2, 8),
        "first_hidden_bias": (2, 8),
    }
    deeper = {
        "deeper_input": (2, 2, 8, 4), "deeper_hidden": (2, 2, 8, 2), "deeper_input_bias": (2, 2, 8),
        "deeper_hidden_bias": (2, 2, 8),
    }  # fmt: skip
    return [
        contextual("p_tuning_lstm", "", E=(3, 3), **first, **head),
        contextual("p_tuning_lstm", "deep", E=(4, 3), **first, **deeper, **head),
    ]
