"""Ranks and scalings as a config says them: one rank and one alpha for most modules, patterns for the others.

PEFT stores no scaling: it divides an alpha by the rank or its root. The alpha that gives a scaling to the last bit is
looked for; where there is none, the scaling goes into B, if the caller allows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import Unrepresentable
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from ...tensors.lazy import as_torch
from .config import exactly
from .losses import Updates
from .spelling import config_name, lora_paths

if TYPE_CHECKING:
    from ...tensors.lazy import Leaf
    from ...updates import Update
    from .hints import Hints

Scale = tuple[int, float]
"""Rank and scaling."""


def number_fields(updates: Updates, hints: Hints, on_loss: str) -> tuple[Updates, dict[str, Any], list[str]]:
    """The fields that say ranks and scalings; where no alpha says a scaling it is folded into B, if allowed."""
    first = hints.config.get("use_rslora") is True
    numbers, inexact = _fields(_scales(updates), (first, not first))
    if not inexact:
        return updates, numbers, []
    paths = lora_paths(updates)
    needy = [target for target in updates if target.path in paths and config_name(target, paths) in inexact]
    items = [f"{target}: no alpha gives its scaling exactly" for target in needy]
    if on_loss not in ("fold", "promote"):
        raise Unrepresentable("PEFT says a scaling as alpha / r", items=items, cure="Allow it with on_loss='fold'")
    changed = {t: tuple(map(_folded, found)) if t in needy else found for t, found in updates.items()}
    numbers, _ = _fields(_scales(changed), (first, not first))
    return changed, numbers, [f"folded the scaling into B of {target}" for target in needy]


def _scales(updates: Updates) -> dict[str, Scale]:
    paths = lora_paths(updates)
    return {
        config_name(target, paths): (int(update.A.shape[int(target.stacked)]), float(update.scaling))
        for target, found in updates.items()
        for update in found
        if isinstance(update, (LoRA, DoRA))
    }


def _folded(update: Update) -> Update:
    """The same law with a scaling of 1, rounded once to the factors' own type."""
    if not isinstance(update, (LoRA, DoRA)):
        return update
    scaled = {name: update.tensors[name] for name in ("B", "bias") if name in update.tensors}
    return update.replace(scaling=1.0, **{name: _times(leaf, update.scaling) for name, leaf in scaled.items()})


def _times(leaf: Leaf, scaling: float) -> Leaf:
    import torch

    whole = as_torch(leaf)
    return (whole.to(torch.float64) * scaling).to(whole.dtype)


def _fields(scales: Mapping[str, Scale], rslora: Sequence[bool]) -> tuple[dict[str, Any], list[str]]:
    """The fields, with the first `use_rslora` that leaves fewest modules without an alpha; and those modules."""
    tried = {flag: {name: exact_alpha(scale, flag) for name, scale in scales.items()} for flag in rslora}
    flag = min(tried, key=lambda flag: sum(alpha is None for alpha in tried[flag].values()))
    alphas = {name: alpha for name, alpha in tried[flag].items() if alpha is not None}
    r = _most_common([rank for rank, _ in scales.values()], 8)
    alpha = _most_common(list(alphas.values()), r)
    fields = {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": flag,
        "rank_pattern": {exactly(name): rank for name, (rank, _) in scales.items() if rank != r},
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
    }
    return fields, [name for name in scales if name not in alphas]


def exact_alpha(scale: Scale, rslora: bool) -> int | float | None:
    """The alpha that PEFT divides to exactly this scaling, whole where it can be; None where there is none."""
    rank, scaling = scale
    divisor = math.sqrt(rank) if rslora else rank
    return next((alpha for alpha in _candidates(scaling * divisor) if alpha / divisor == scaling), None)


def _candidates(guess: float) -> Iterator[int | float]:
    if not math.isfinite(guess):
        return
    if abs(guess) < 1 << 53:
        yield round(guess)
    yield guess
    yield math.nextafter(guess, math.inf)
    yield math.nextafter(guess, -math.inf)


def _most_common(values: Sequence[Any], default: Any) -> Any:
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value), default=default)
