"""Rows: W'[:, index[j]] = values[j]."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, Case, Pair, Update, low_rank
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, index: Array, values: Array) -> Pair:
    """W'[:, index[j]] = values[j]."""
    W = W.copy()
    for position, value in zip(index, values, strict=True):
        W[:, position] = value
    return W, b


def cases() -> list[Case]:
    """Embeddings and other weights, types of index, the order of rows and a LoRA on one target."""
    return [
        Case("embedding", updates=(_rows("rows.embedding", [1, 4], 3),), **EMBEDDING),
        Case("one", updates=(_rows("rows.one", [3], 3),), **EMBEDDING),
        Case("all_backwards", updates=(_rows("rows.all", [5, 4, 3, 2, 1, 0], 3),), **EMBEDDING),
        Case("int32", updates=(_rows("rows.int32", [0, 5], 3, "int32"),), **EMBEDDING),
        Case("linear", updates=(_rows("rows.linear", [4, 0], 3),), **BIASED),
        Case("experts", updates=(_rows("rows.experts", [[4, 0], [1, 2]], 3),), **EXPERTS),
        Case("after_lora", updates=(low_rank("lora", "rows.lora", 3, 6), _rows("rows.after", [1, 2], 3)), **EMBEDDING),
        Case(
            "before_lora", updates=(_rows("rows.before", [1, 2], 3), low_rank("lora", "rows.lora2", 3, 6)), **EMBEDDING
        ),
        Case("bf16", updates=(_rows("rows.bf16", [1, 4], 3),), dtype="BF16", **EMBEDDING),
    ]


def _rows(seed: str, index: list[Any], out: int, dtype: str = "int64") -> Update:
    """Token rows; a list of lists makes a stack of them."""
    tokens = np.array(index, dtype)
    return Update("rows", {"index": tokens, "values": numbers(f"{seed}.values", *tokens.shape, out)})
