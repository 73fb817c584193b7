"""X-LoRA: y' = y + scaling * sum of the experts' low-rank changes, by a classifier of the model's last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import BIASED, IN_OUT, Case, Update, update
from container import numbers
from layers import Array

LONG: dict[str, Any] = BIASED | {"x": (2, 3, 5)}
STATES = numbers("xlora.hidden_states", 2, 3, 4)
_CALLED: dict[str, Any] = LONG | {"call": {"hidden_states": STATES}}


def output(
    x: Array, layer: Callable[[Array], Array], hidden_states: Array, last: Array, last_bias: Array,
    A: Array | None = None, B: Array | None = None, strengths: Array | None = None, first: Array | None = None,
    first_bias: Array | None = None, inner: Array | None = None, inner_bias: Array | None = None, place: int = 0,
    enable_softmax: bool = True, enable_softmax_topk: bool = False, softmax_temperature: float = 1.0, top_k: int = 0,
    scaling: float = 1.0,
) -> Array | None:  # fmt: skip
    """Place by place: the classifier, then the shares that are left, then the experts; nothing without those."""
    if A is None or B is None or strengths is None:
        return None
    y, experts = layer(x).copy(), len(A)
    for at in np.ndindex(*x.shape[:-1]):
        h = hidden_states[at]
        if first is not None:
            h = np.maximum(first @ h + first_bias, 0)
        for W, b in () if inner is None or inner_bias is None else zip(inner, inner_bias, strict=True):
            h = np.maximum(W @ h + b, 0)
        shares = (last @ h + last_bias)[place * experts :][:experts]
        if enable_softmax:
            powers = np.exp((shares - shares.max()) / softmax_temperature)
            shares = powers / powers.sum()
        if top_k:
            kept = sorted(range(experts), key=lambda e: -shares[e])[:top_k]
            shares = np.array([shares[e] if e in kept else 0.0 for e in range(experts)])
        if enable_softmax_topk:
            powers = np.where(shares != 0, np.exp(shares), 0.0)
            shares = powers / powers.sum()
        for e in range(experts):
            y[at] += scaling * shares[e] * strengths[e] * (B[e] @ (A[e] @ x[at]))
    return y


def cases() -> list[Case]:
    """Classifiers of one to three layers, logits for all layers and for each, every way to choose."""
    deep = {"first": (6, 4), "first_bias": (6,)}
    deeper = deep | {"inner": (1, 6, 6), "inner_bias": (1, 6)}
    plain = {"enable_softmax": False}
    return [
        _case("one_layer", {}),
        _case("two_layers", deep, softmax_temperature=8.0, scaling=0.5),
        _case("three_layers", deeper, **plain),
        _case("places", deep, logits=6, place=1, **plain),
        _case("best", {}, top_k=2),
        _case("softmax_of_best", {}, top_k=2, enable_softmax_topk=True, **plain),
        _case("in_out", {}, **IN_OUT),
        Case("", updates=(update("xlora", "xlora.model", last=(3, 4), last_bias=(3,)),), **_CALLED),
        _case("bf16", {}, dtype="BF16"),
    ]


def _case(name: str, shapes: dict[str, tuple[int, ...]], /, logits: int = 3, dtype: str = "F64", **more: Any) -> Case:
    width = 6 if shapes else 4
    factors = {"A": (3, 2, 5), "B": (3, 3, 2), "strengths": (3,), "last": (logits, width), "last_bias": (logits,)}
    layer = LONG | {key: value for key, value in more.items() if key in IN_OUT} | {"x": (2, 3, 5), "dtype": dtype}
    made = update("xlora", f"xlora.{name}", **factors, **shapes)
    attributes = {key: value for key, value in more.items() if key not in IN_OUT}
    updates = (Update(made.method, made.tensors, attributes),)
    return Case(name, updates=updates, call={"hidden_states": STATES}, **layer)
