"""A prefix of one attention with its network, behind gates."""

from __future__ import annotations

from building import Case, contextual
from layers import Array

from methods import gated_prefix, prefix_mlp


def context(E: Array, W1: Array, b1: Array, W2: Array, b2: Array, gate: Array, gate_bias: Array) -> dict[str, Array]:
    """What the network gives, times its shares."""
    past = prefix_mlp.context(E, W1, b1, W2, b2)["past"]
    return gated_prefix.gated(past, gate, gate_bias, "gated_prefix_mlp")


def cases() -> list[Case]:
    """One gate for keys and values, and one each."""
    sizes = {"E": (3, 4), "W1": (5, 4), "b1": (5,), "W2": (1, 2, 2, 3, 5), "b2": (1, 2, 2, 3)}
    return [
        contextual("gated_prefix_mlp", "", **sizes, gate=(1, 4), gate_bias=(1,)),
        contextual("gated_prefix_mlp", "apart", **sizes, gate=(2, 4), gate_bias=(2,)),
    ]
