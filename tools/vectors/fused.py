"""Weights that Megatron fuses, for samples of the base `llama`: q, k and v by groups of heads; gate above up."""

from __future__ import annotations

import numpy as np
from layers import Array
from sample import Wanted, pair

GROUPS, QUERIES, DIM = 2, 2, 4


def qkv(seed: str, layer: int, scaling: float) -> tuple[Array, Array, list[Wanted]]:
    """A, B of the fused weight, and what they are of q, k and v: in each group two queries, a key, a value."""
    A, B = pair(seed, GROUPS * (QUERIES + 2) * DIM, 16)
    heads = B.reshape(GROUPS, QUERIES + 2, DIM, -1)
    parts = {"q": heads[:, :QUERIES], "k": heads[:, QUERIES], "v": heads[:, QUERIES + 1]}
    return A, B, [
        wanted(f"{layer}.self_attn.{name}_proj", A, part.reshape(-1, B.shape[1]), scaling)
        for name, part in parts.items()
    ]  # fmt: skip


def gate_up(seed: str, layer: int, scaling: float) -> tuple[Array, Array, list[Wanted]]:
    """A, B of the fused weight, and what they are of gate and up."""
    A, B = pair(seed, 48, 16)
    both = zip(("gate", "up"), np.split(B, 2), strict=True)
    return A, B, [wanted(f"{layer}.mlp.{name}_proj", A, part, scaling) for name, part in both]


def wanted(module: str, A: Array, B: Array, scaling: float) -> Wanted:
    """A LoRA of a module of a layer."""
    return Wanted(f"model.layers.{module}", {"A": A, "B": B}, {"scaling": scaling})
