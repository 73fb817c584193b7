"""Textual inversion: embeddings of new tokens."""

from __future__ import annotations

from building import Case, contextual
from layers import Array


def context(P: Array, token: str = "") -> dict[str, Array]:  # noqa: ARG001 - it does not change what is computed here
    """As they are."""
    return {"vocabulary": P}


def cases() -> list[Case]:
    """One token and several, named or not."""
    return [
        contextual("textual_inversion", "one", attributes={"token": "<cat>"}, P=(1, 4)),
        contextual("textual_inversion", "three", P=(3, 4)),
    ]
