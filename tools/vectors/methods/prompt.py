"""Prompt: embeddings = P, or its first rows."""

from __future__ import annotations

from building import Case, contextual
from layers import Array


def context(P: Array, used: int = 0) -> dict[str, Array]:
    """The first `used` rows; all where it is 0."""
    return {"embeddings": P[: used or len(P)]}


def cases() -> list[Case]:
    """The whole model and a part of it, with and without rows that are only stored."""
    return [
        contextual("prompt", "", P=(3, 4)),
        contextual("prompt", "used", attributes={"used": 2}, P=(4, 5)),
        contextual("prompt", "part.of.it", P=(1, 6)),
        contextual("prompt", "bf16", dtype="BF16", P=(2, 3)),
    ]
