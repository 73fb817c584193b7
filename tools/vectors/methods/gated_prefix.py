"""A prefix of one attention behind gates: shares row by row."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from container import numbers
from layers import Array


def gated(P: Array, gate: Array, gate_bias: Array, seed: str) -> dict[str, Array]:
    """Row by row, keys and values apart, for an input `[2, 3, width]` that is drawn here."""
    x = numbers(f"{seed}.{gate.shape}.x", 2, 3, gate.shape[1])
    out = np.empty((2, *P.shape[1:]))
    for row, kind in np.ndindex(2, 2):
        which = kind % len(gate)
        shares = [1 / (1 + np.exp(-(np.dot(gate[which], token) + gate_bias[which]))) for token in x[row]]
        out[row, kind] = P[0, kind] * sum(shares) / len(shares)
    return {"x": x, "prefix": out}


def context(P: Array, gate: Array, gate_bias: Array) -> dict[str, Array]:
    """The prefix times its shares."""
    return gated(P, gate, gate_bias, "gated_prefix")


def cases() -> list[Case]:
    """One gate for keys and values, and one each."""
    return [
        contextual("gated_prefix", "", P=(1, 2, 2, 3, 4), gate=(1, 8), gate_bias=(1,)),
        contextual("gated_prefix", "apart", P=(1, 2, 1, 2, 3), gate=(2, 5), gate_bias=(2,)),
    ]
