"""LLaMA-Adapter: gated attention over a prompt."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from container import numbers
from layers import Array


def context(P: Array, gate: Array, projected: bool = True) -> dict[str, Array]:  # noqa: ARG001 - it does not change what is computed here
    """Head by head, query by query, for queries, keys and values that are drawn here."""
    heads, d = 2, 3
    seed = f"adaption_prompt.{len(P)}.{len(gate)}"
    q = numbers(f"{seed}.q", 2, heads, 4, d)
    k, v = (numbers(f"{seed}.{name}", heads, len(P), d) for name in "kv")
    y = np.empty_like(q)
    for batch, head, place in np.ndindex(*q.shape[:3]):
        weights = np.exp(k[head] @ q[batch, head, place] / np.sqrt(d))
        y[batch, head, place] = gate[head % len(gate)] * (weights / weights.sum()) @ v[head]
    return {"q": q, "k": k, "v": v, "attention": y}


def cases() -> list[Case]:
    """One gate and one a head."""
    return [
        contextual("adaption_prompt", "one", P=(4, 5), gate=(1,)),
        contextual("adaption_prompt", "each", P=(3, 5), gate=(2,)),
        contextual("adaption_prompt", "mixed", attributes={"projected": False}, P=(2, 5), gate=(1,)),
    ]
