"""VB-LoRA: W' = W + B A, each piece of b numbers of a factor being a mixture of the bank's vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, EMBEDDING, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update
from container import numbers
from layers import Array


def formula(
    W: Array, b: Array | None, bank: Array, logits_A: Array | None = None, logits_B: Array | None = None,
    indices_A: Array | None = None, weights_A: Array | None = None, indices_B: Array | None = None,
    weights_B: Array | None = None, topk: int = 2,
) -> Pair:  # fmt: skip
    """Piece by piece."""
    A, B = np.zeros((0, W.shape[1])), np.zeros((W.shape[0], 0))
    pieces_A = _pieces(bank, logits_A, indices_A, weights_A, topk)
    pieces_B = _pieces(bank, logits_B, indices_B, weights_B, topk)
    for row in pieces_A:
        A = np.vstack([A, np.concatenate(row)])
    for rank in range(len(pieces_A)):
        B = np.column_stack([B, np.concatenate([tile[rank] for tile in pieces_B])])
    return W + np.einsum("or,ri->oi", B, A), b


def _pieces(
    bank: Array, logits: Array | None, indices: Array | None, weights: Array | None, topk: int
) -> list[list[Array]]:
    if logits is not None:
        return [[_by_logits(bank, piece, topk) for piece in row] for row in logits]
    assert indices is not None
    assert weights is not None
    pairs = [list(zip(*row, strict=True)) for row in zip(indices, weights, strict=True)]
    return [[sum(w * bank[i] for i, w in zip(at, by, strict=True)) for at, by in row] for row in pairs]


def _by_logits(bank: Array, logits: Array, topk: int) -> Array:
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:topk]
    weights = [np.exp(logits[i]) for i in best]
    return sum(w * bank[i] for i, w in zip(best, weights, strict=True)) / sum(weights)


def cases() -> list[Case]:
    """Logits, and what is left of them; a bank that two targets share; every layout."""
    bank = numbers("vblora.bank", 5, 1)
    return [
        Case("linear", updates=(_logits("linear", 3, 5),), **BIASED),
        Case("pieces", updates=(_logits("pieces", 4, 6, b=2, topk=3),), weight=(4, 6), x=(2, 6)),
        Case("greedy", updates=(_logits("greedy", 3, 5, topk=1),), **LINEAR),
        Case("chosen", updates=(_chosen("chosen", 3, 5),), **LINEAR),
        Case("chosen_pieces", updates=(_chosen("chosen_pieces", 4, 6, b=2, m=3, kind="int32"),), weight=(4, 6),
             x=(2, 6)),
        Case("shared_one", updates=(_logits("shared_one", 3, 5, bank=bank),), **LINEAR),
        Case("shared_two", updates=(_chosen("shared_two", 3, 5, bank=bank),), **LINEAR),
        Case("in_out", updates=(_logits("in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_logits("embedding", 3, 6, b=3),), **EMBEDDING),
        Case("experts", updates=(_logits("experts", 3, 5, e=2),), **EXPERTS),
        Case("fused", updates=(_chosen("fused", 3, 5),), **FUSED),
        Case("bf16", updates=(_logits("bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]  # fmt: skip


def _logits(
    seed: str, out: int, in_: int, r: int = 2, n: int = 5, b: int = 1, topk: int | None = None, e: int = 0,
    bank: Array | None = None,
) -> Update:  # fmt: skip
    lead = (e,) if e else ()
    tensors = {
        "bank": numbers(f"vblora.{seed}.bank", *lead, n, b) if bank is None else bank,
        "logits_A": _distinct(f"vblora.{seed}.A", *lead, r, in_ // b, n),
        "logits_B": _distinct(f"vblora.{seed}.B", *lead, out // b, r, n),
    }
    return Update("vblora", tensors, {} if topk is None else {"topk": topk})


def _distinct(seed: str, *shape: int) -> Array:
    """Logits of which no two of a piece are equal."""
    rng = np.random.default_rng(len(seed))
    pieces = [rng.permutation(33)[: shape[-1]] / 8 - 2 for _ in range(int(np.prod(shape[:-1])))]
    return np.array(pieces).reshape(shape)


def _chosen(
    seed: str, out: int, in_: int, r: int = 2, n: int = 5, b: int = 1, m: int = 2, bank: Array | None = None,
    kind: str = "int64",
) -> Update:  # fmt: skip
    rng = np.random.default_rng(len(seed))
    A, B = (r, in_ // b, m), (out // b, r, m)
    tensors: dict[str, Any] = {"bank": numbers(f"vblora.{seed}.bank", n, b) if bank is None else bank}
    for name, shape in (("A", A), ("B", B)):
        tensors[f"indices_{name}"] = rng.integers(0, n, shape).astype(kind)
        tensors[f"weights_{name}"] = numbers(f"vblora.{seed}.w{name}", *shape)
    return Update("vblora", tensors)
