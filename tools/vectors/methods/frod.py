"""FRoD: W' = U (S + diag(l)) V^T, U the columns of W V^-T made of length 1."""

from __future__ import annotations

import math

import numpy as np
from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from container import numbers
from exact import exact, floats, inverse
from layers import Array


def formula(W: Array, b: Array | None, l: Array, values: Array, V: Array, index: Array) -> Pair:  # noqa: E741
    """S and the inverse of V as whole matrices."""
    U = exact(W) @ inverse(exact(V)).T
    lengths = [math.sqrt(float(sum(v * v for v in column))) for column in U.T]
    U = U / np.array([exact(np.array([length or 1.0]))[0] for length in lengths], dtype=object)
    S = exact(np.diag(l))
    for row, column, value in zip(*index, values, strict=True):
        S[row, column] += exact(np.array([value]))[0]
    return floats(U @ S @ exact(V).T), b


def cases() -> list[Case]:
    """With places of S and without any; a V that two targets share."""
    shared = _frod("frod.shared", 5, [[0, 1], [2, 2]])
    again = Update("frod", _frod("frod.again", 5, [[4, 3], [2, 0]]).tensors | {"V": shared.tensors["V"]})
    still = update("frod", "frod.empty", l=(5,), V=(5, 5))
    empty = {"values": np.zeros(0), "index": np.zeros((2, 0), np.int64)}
    return [
        Case("linear", updates=(_frod("frod.linear", 5, [[0, 1, 4], [3, 2, 4]]),), **BIASED),
        Case("shared", updates=(shared,), **LINEAR),
        Case("shared_again", updates=(again,), **LINEAR),
        Case("empty", updates=(Update("frod", still.tensors | empty),), **LINEAR),
        Case("tall", updates=(_frod("frod.tall", 3, [[0], [2]]),), weight=(5, 3), x=(2, 3)),
        Case("in_out", updates=(_frod("frod.in_out", 5, [[0, 1], [3, 2]]),), **IN_OUT),
        Case("experts", updates=(_frod("frod.experts", 5, [[[0, 1], [3, 2]], [[4, 0], [0, 4]]], (2,)),), **EXPERTS),
        Case("fused", updates=(_frod("frod.fused", 5, [[0, 1], [3, 2]]),), **FUSED),
        Case("bf16", updates=(_frod("frod.bf16", 5, [[0, 1], [3, 2]]),), dtype="BF16", **LINEAR),
    ]


def _frod(seed: str, size: int, index: list[list[int]] | list[list[list[int]]], e: tuple[int, ...] = ()) -> Update:
    """V is made well-conditioned: eight times the identity more."""
    places = np.array(index, np.int64)
    made = {"l": numbers(f"{seed}.l", *e, size), "values": numbers(f"{seed}.values", *e, places.shape[-1])}
    made["V"] = numbers(f"{seed}.V", *e, size, size) + 8 * np.eye(size)
    return Update("frod", made | {"index": places})
