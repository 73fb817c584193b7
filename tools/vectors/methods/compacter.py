"""Compacter: a bottleneck whose two matrices are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from building import Case, Update
from layers import Array
from sublayers import ACTIVATIONS, made, sublayer

FOUR: dict[str, Any] = {"weight": (4, 5), "bias": (4,)}
SHAPES: dict[str, tuple[int, ...]] = {
    "gate": (1, 4), "gate_bias": (1,), "norm_before": (4,), "norm_before_bias": (4,), "norm_after": (4,),
    "norm_after_bias": (4,), "scaling_factor": (1,), "channel_scaling": (4,),
    "down_rule": (2, 2, 2), "down_rule_left": (2, 2, 1), "down_rule_right": (2, 1, 2), "down_W": (2, 2, 1),
    "down_left": (2, 2, 1), "down_right": (2, 1, 1), "down_bias": (2,),
    "up_rule": (2, 2, 2), "up_rule_left": (2, 2, 1), "up_rule_right": (2, 1, 2), "up_W": (2, 1, 2),
    "up_left": (2, 1, 1), "up_right": (2, 1, 2), "up_bias": (4,),
}  # fmt: skip


def output(x: Array, layer: Callable[[Array], Array], non_linearity: str = "relu", **given: Any) -> Array:
    """The layer's output through the adapter."""
    own = {name: given.pop(name) for name in list(given) if name.startswith(("down_", "up_"))}

    def change(h: Array) -> Array:
        inner = ACTIVATIONS[non_linearity](h @ _matrix("down", own) + own.get("down_bias", 0))
        return inner @ _matrix("up", own) + own.get("up_bias", 0)

    return sublayer(change, x, layer(x), **given)


def _matrix(side: str, own: dict[str, Array]) -> Array:
    n = len(next(array for name, array in own.items() if name.startswith(f"{side}_rule")))
    total: Any = 0
    for i in range(n):
        rule = (
            own[f"{side}_rule"][i]
            if f"{side}_rule" in own
            else own[f"{side}_rule_left"][i] @ own[f"{side}_rule_right"][i]
        )
        W = own[f"{side}_W"][i] if f"{side}_W" in own else own[f"{side}_left"][i] @ own[f"{side}_right"][i]
        total = total + np.kron(rule, W)
    return total  # type: ignore[no-any-return]


def cases() -> list[Case]:
    """Rules and weights whole or in factors, one rule for both sides, and the fields of every bottleneck."""
    whole, factors = "down_rule down_W up_rule up_W", "down_rule down_left down_right up_rule up_left up_right"
    rules = "down_rule_left down_rule_right down_W up_rule_left up_rule_right up_W"
    biases, norms = "down_bias up_bias", "norm_before norm_before_bias norm_after norm_after_bias"
    beside = {"added": (2, 4), "norm_weight": (4,), "norm_bias": (4,)}
    pfeiffer = {"original_ln_before": True, "residual_before_ln": "post_add", "original_ln_after": False}
    plain = {
        "whole": _update("whole", f"{whole} {biases}"),
        "factors": _update("factors", f"{factors} {biases}", non_linearity="gelu"),
        "shared_rule": _shared(f"{factors} {biases}"),
        "rules_in_factors": _update("rules", rules),
        "scaled": _update("scaled", f"{whole} scaling_factor", scaling=0.5),
        "channels": _update("channels", f"{whole} channel_scaling"),
        "gated": _update("gated", f"{whole} gate gate_bias"),
        "norms": _update("norms", f"{whole} {norms}", adapter_residual_before_ln=True),
    }
    placed = {
        "pfeiffer": _update("pfeiffer", factors, **pfeiffer),
        "parallel": _update("parallel", factors, parallel=True),
        "sibling": _update("sibling", factors, residual="first", norm="last"),
    }
    return [
        *(Case(name, updates=(update,), **FOUR) for name, update in plain.items()),
        Case("in_out", updates=(_update("in_out", whole),), weight=(5, 4), layout="in out *k", bias=(4,)),
        *(Case(name, updates=(update,), beside=beside, **FOUR) for name, update in placed.items()),
    ]


def _update(seed: str, names: str, **attributes: Any) -> Update:
    return made("compacter", f"compacter.{seed}", {name: SHAPES[name] for name in names.split()}, "", **attributes)


def _shared(names: str) -> Update:
    update = _update("shared", names)
    return Update(update.method, update.tensors | {"up_rule": update.tensors["down_rule"]}, update.attributes)
