"""OSF: W' = W without its smallest singular values, + U diag(S) V."""

from __future__ import annotations

from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from exact import exact, floats, singular
from layers import Array


def formula(W: Array, b: Array | None, U: Array, S: Array, V: Array) -> Pair:
    """The part that stays is summed up, value by value."""
    left, values, right = singular(W)
    new = (exact(U) * exact(S)) @ exact(V)
    for i in range(len(values) - len(S)):
        new = new + exact(left[:, i : i + 1] * values[i]) @ exact(right[i : i + 1])
    return floats(new), b


def cases() -> list[Case]:
    """From one singular value to all."""
    return [
        Case("linear", updates=(_osf("osf.linear", 3, 5, 2),), **BIASED),
        Case("one", updates=(_osf("osf.one", 3, 5, 1),), **LINEAR),
        Case("all", updates=(_osf("osf.all", 3, 5, 3),), **LINEAR),
        Case("tall", updates=(_osf("osf.tall", 5, 3, 2),), weight=(5, 3), x=(2, 3)),
        Case("in_out", updates=(_osf("osf.in_out", 3, 5, 2),), **IN_OUT),
        Case("experts", updates=(update("osf", "osf.experts", U=(2, 3, 2), S=(2, 2), V=(2, 2, 5)),), **EXPERTS),
        Case("fused", updates=(_osf("osf.fused", 3, 5, 2),), **FUSED),
        Case("bf16", updates=(_osf("osf.bf16", 3, 5, 2),), dtype="BF16", **LINEAR),
    ]


def _osf(seed: str, out: int, in_: int, rank: int) -> Update:
    return update("osf", seed, U=(out, rank), S=(rank,), V=(rank, in_))
