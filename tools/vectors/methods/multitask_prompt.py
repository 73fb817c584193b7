"""Multitask prompt: P times a low-rank matrix of the task, element by element."""

from __future__ import annotations

import numpy as np
from building import Case, contextual
from layers import Array


def context(P: Array, columns: Array, rows: Array, task: int = 0, decoder: bool = False) -> dict[str, Array]:
    """Of one task; in halves where there is a decoder."""
    prompt = np.einsum("nd,nr,rd->nd", P, columns[task], rows[task])
    if not decoder:
        return {"embeddings": prompt}
    half = len(P) // 2
    return {"embeddings": prompt[:half], "decoder_embeddings": prompt[half:]}


def cases() -> list[Case]:
    """Ranks, tasks, a decoder."""
    shapes = {"P": (4, 3), "columns": (2, 4, 2), "rows": (2, 2, 3)}
    return [
        contextual("multitask_prompt", "", **shapes),
        contextual("multitask_prompt", "second", attributes={"task": 1}, **shapes),
        contextual("multitask_prompt", "decoder", attributes={"decoder": True}, **shapes),
        contextual("multitask_prompt", "one", P=(3, 5), columns=(1, 3, 1), rows=(1, 1, 5)),
    ]
