"""Rewriting for a dialect: scalings folded into factors, and laws of low rank as the LoRA that they come down to.

Promotions are exact: no decomposition, but a larger rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...adapter import Target
from ...methods._low_rank import LowRank
from ...methods.loha import LoHa
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...tensors.lazy import as_array, from_numpy
from ...updates import Update
from .encode import folded, why_not
from .file import Rules

Updates = Mapping[Target, tuple[Update, ...]]


def promoted(update: Update) -> LoRA | None:
    """The LoRA of the same change, of a larger rank, in float32; None where there is none."""
    arrays = {name: as_array(leaf).astype("<f8") for name, leaf in update.tensors.items()}
    if isinstance(update, LoHa) and update.t1 is None:
        return _pair(*_hadamard(**arrays), update.scaling)
    if isinstance(update, LoKr) and update.t2 is None:
        return _pair(*_kronecker(arrays), update.scaling)
    if isinstance(update, LowRank):
        return _low_rank(update, arrays)
    return None


def _hadamard(w1_a: Any, w1_b: Any, w2_a: Any, w2_b: Any) -> tuple[Any, Any]:
    """B[o, pq] = w1_a[o, p] w2_a[o, q]; A[pq, i] = w1_b[p, i] w2_b[q, i]."""
    B = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(len(w1_a), -1)
    return B, (w1_b[:, None, :] * w2_b[None, :, :]).reshape(-1, w1_b.shape[1])


def _kronecker(arrays: dict[str, Any]) -> tuple[Any, Any]:
    import numpy as np

    B1, A1 = _factored(arrays, "w1", np)
    B2, A2 = _factored(arrays, "w2", np)
    return np.kron(B1, B2), np.kron(A1, A2)


def _factored(arrays: dict[str, Any], name: str, np: Any) -> tuple[Any, Any]:
    """Two factors of w1 or w2; a whole one is parted on its shorter side."""
    if f"{name}_a" in arrays:
        return arrays[f"{name}_a"], arrays[f"{name}_b"]
    whole = arrays[name].reshape(len(arrays[name]), -1)
    short = min(whole.shape)
    return (np.eye(short), whole) if len(whole) == short else (whole, np.eye(short))


def _low_rank(update: Any, arrays: dict[str, Any]) -> LoRA | None:
    dims = update.dims()
    if "out" not in dims or "in" not in dims or dims.get("k"):
        return None
    loaded = update.replace(**arrays)
    B, A = loaded.pair((dims["out"], dims["in"]))
    return _pair(B, A, 1.0)


def _pair(B: Any, A: Any, scaling: float) -> LoRA:
    leaves: dict[str, Any] = {"A": from_numpy(A.astype("<f4")), "B": from_numpy(B.astype("<f4"))}
    return LoRA(**leaves, scaling=scaling)


def rewritten(updates: Updates, rules: Rules, on_loss: str) -> tuple[Updates, list[str]]:
    """Scalings folded and laws promoted, where that is allowed and needed."""
    if on_loss not in ("fold", "promote"):
        return updates, []
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        changed[target] = tuple(_rewrite(target, update, rules, on_loss, lines) for update in found)
    return changed, lines


def _rewrite(target: Target, update: Update, rules: Rules, on_loss: str, lines: list[str]) -> Update:
    if not why_not(update, rules):
        return update
    other = folded(update, rules)
    if not why_not(other, rules):
        lines.append(f"folded the scaling into a factor of {target}")
        return other
    exact = promoted(update) if on_loss == "promote" else None
    if exact is None or why_not(exact, rules):
        return update
    lines.append(f"wrote {update.method} at {target} as a LoRA of rank {exact.A.shape[0]}")
    return exact
