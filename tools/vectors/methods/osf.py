"""OSF: W' = W - U_own diag(S_own) V_own + U diag(S) V; without a part of its own to take off, all of W goes.

That is the one case in which tools need not decompose W, which they do in float32.
"""

from __future__ import annotations

from building import BIASED, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, update
from exact import exact, floats
from layers import Array


def formula(
    W: Array,
    b: Array | None,
    U: Array,
    S: Array,
    V: Array,
    U_own: Array | None = None,
    S_own: Array | None = None,
    V_own: Array | None = None,
) -> Pair:
    """In fractions."""
    trained = (exact(U) * exact(S)) @ exact(V)
    if U_own is None or S_own is None or V_own is None:
        if len(S) < min(W.shape):
            raise ValueError("W's own part is not exact")
        return floats(trained), b
    return floats(exact(W) - (exact(U_own) * exact(S_own)) @ exact(V_own) + trained), b


def cases() -> list[Case]:
    """From one singular value to all."""
    return [
        Case("linear", updates=(_osf("osf.linear", 3, 5, 2),), **BIASED),
        Case("one", updates=(_osf("osf.one", 3, 5, 1),), **LINEAR),
        Case("all", updates=(update("osf", "osf.all", U=(3, 3), S=(3,), V=(3, 5)),), **LINEAR),
        Case("tall", updates=(_osf("osf.tall", 5, 3, 2),), weight=(5, 3), x=(2, 3)),
        Case("in_out", updates=(_osf("osf.in_out", 3, 5, 2),), **IN_OUT),
        Case("experts", updates=(_osf("osf.experts", 3, 5, 2, (2,)),), **EXPERTS),
        Case("fused", updates=(_osf("osf.fused", 3, 5, 2),), **FUSED),
        Case("bf16", updates=(_osf("osf.bf16", 3, 5, 2),), dtype="BF16", **LINEAR),
    ]


def _osf(seed: str, out: int, in_: int, rank: int, e: tuple[int, ...] = ()) -> Update:
    shapes = {"U": (*e, out, rank), "S": (*e, rank), "V": (*e, rank, in_)}
    own = {f"{name}_own": shape for name, shape in shapes.items()}
    return update("osf", seed, None, **shapes, **own)
