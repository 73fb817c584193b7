"""Activated LoRA: y' = y + scaling * (B A x + bias) from the last invocation of each row on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, IN_OUT, Case, Update, update
from layers import Array

TOKENS = np.array([[7, 3, 4, 9, 3, 4], [3, 4, 3, 3, 9, 4], [1, 2, 7, 7, 3, 5]])
"""The invocation 3, 4 twice, once, and not at all."""


def output(
    x: Array, layer: Callable[[Array], Array], input_ids: Array, A: Array, B: Array, invocation: Array,
    bias: Array | None = None, scaling: float = 1.0,
) -> Array:  # fmt: skip
    """Row by row; the last position of x is the last token's."""
    y, wanted = layer(x).copy(), list(invocation)
    for row, tokens in enumerate(input_ids):
        starts = [at for at in range(len(tokens)) if list(tokens[at : at + len(wanted)]) == wanted]
        for back in range(1, x.shape[1] + 1):
            if starts and len(tokens) - back >= starts[-1]:
                change = B @ (A @ x[row, -back]) + (0 if bias is None else bias)
                y[row, -back] += scaling * change
    return y


def cases() -> list[Case]:
    """Rows with several invocations, one, and none; fewer positions than tokens, as behind a cache, and more."""
    return [
        _case("plain", 6, update=_update("plain")),
        _case("scaled", 6, update=_update("scaled", scaling=0.5)),
        _case("biased", 6, update=_update("biased", bias=(3,), scaling=-1.5)),
        _case("behind_a_cache", 2, update=_update("behind_a_cache")),
        _case("behind_virtual_tokens", 8, update=_update("behind_virtual_tokens", bias=(3,))),
        _case("one_token", 6, update=_update("one_token", invocation=[9])),
        _case("longer_than_the_input", 6, update=_update("longer", invocation=[3, 4, 9, 3, 4, 1, 1])),
        _case("in_out", 6, update=_update("in_out"), **IN_OUT),
        _case("bf16", 6, update=_update("bf16"), dtype="BF16"),
    ]


def _case(name: str, positions: int, /, update: Update, **more: Any) -> Case:
    given = BIASED | more | {"x": (3, positions, 5)}
    return Case(name, updates=(update,), call={"input_ids": TOKENS}, **given)


def _update(
    seed: str, invocation: tuple[int, ...] | list[int] = (3, 4), scaling: float | None = None, **more: Any
) -> Update:
    made = update("alora", f"alora.{seed}", scaling, A=(2, 5), B=(3, 2), **more)
    return Update(made.method, made.tensors | {"invocation": np.array(invocation, dtype=np.int64)}, made.attributes)
