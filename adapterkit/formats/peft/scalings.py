"""Ranks and scalings as a config says them: one rank and one alpha for most modules, patterns for the others.

PEFT stores no scaling: it divides an alpha by the rank or its root. The alpha that gives a scaling to the last bit is
looked for; where there is none, the scaling goes into B, if the caller allows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ...errors import Unrepresentable
from ...methods.olora import OLoRA
from ...tensors.lazy import as_torch
from .alphas import Scale
from .alphas import number_fields as scale_fields
from .families import family_of_method
from .losses import acting_method
from .pairs import PAIRS, rank_of
from .spelling import config_name, lora_paths

if TYPE_CHECKING:
    from ...adapter import Updates
    from ...tensors.lazy import Leaf
    from ...updates import Update
    from .hints import Hints


def number_fields(updates: Updates, hints: Hints, on_loss: str) -> tuple[Updates, dict[str, Any], list[str]]:
    """The fields that say ranks and scalings; where no alpha says a scaling it is folded into B, if allowed."""
    updates, lines = _family_folded(updates, on_loss)
    if lines:
        return updates, {}, lines
    first = hints.config.get("use_rslora") is True
    numbers, inexact = scale_fields(_scales(updates), (first, not first))
    if not inexact:
        return updates, numbers, []
    paths = lora_paths(updates)
    needy = [target for target in updates if target.path in paths and config_name(target, paths) in inexact]
    items = [f"{target}: no alpha gives its scaling exactly" for target in needy]
    if on_loss not in ("fold", "promote") or any(isinstance(u, OLoRA) for target in needy for u in updates[target]):
        raise Unrepresentable("PEFT says a scaling as alpha / r", items=items, cure="Allow it with on_loss='fold'")
    changed = {t: tuple(map(_folded, found)) if t in needy else found for t, found in updates.items()}
    numbers, _ = scale_fields(_scales(changed), (first, not first))
    return changed, numbers, [f"folded the scaling into B of {target}" for target in needy]


def _family_folded(updates: Updates, on_loss: str) -> tuple[Updates, list[str]]:
    """The updates of a family, scalings that its config cannot say folded into the field that takes them."""
    method = acting_method(updates)
    family = family_of_method(method)
    needy = family.inexact(updates) if family else []
    if family is None or not needy:
        return updates, []
    items = [f"{path}: no alpha gives its scaling exactly" for path in needy]
    if on_loss not in ("fold", "promote"):
        raise Unrepresentable("PEFT says a scaling as alpha / r", items=items, cure="Allow it with on_loss='fold'")

    def folded(update: Update) -> Update:
        field = next((name for name in family.folds if name in update.tensors), None)
        if type(update) is not method or field is None:
            return update
        scaled = _times(update.tensors[field], update.attributes["scaling"])
        return update.replace(scaling=1.0, **{field: scaled})

    changed = {t: tuple(map(folded, found)) if t.path in needy else found for t, found in updates.items()}
    return changed, [f"folded the scaling into a factor of {path}" for path in needy]


def _scales(updates: Updates) -> dict[str, Scale]:
    paths = lora_paths(updates)
    return {
        config_name(target, paths): (rank_of(update, target.stacked), float(cast(Any, update).scaling))
        for target, found in updates.items()
        for update in found
        if isinstance(update, PAIRS)
    }


def _folded(update: Update) -> Update:
    """The same law with a scaling of 1, rounded once to the factors' own type."""
    if not isinstance(update, PAIRS) or isinstance(update, OLoRA):
        return update
    scaled = {name: update.tensors[name] for name in ("B", "B_blocks", "bias") if name in update.tensors}
    return update.replace(scaling=1.0, **{name: _times(leaf, update.scaling) for name, leaf in scaled.items()})


def _times(leaf: Leaf, scaling: float) -> Leaf:
    import torch

    whole = as_torch(leaf)
    return (whole.to(torch.float64) * scaling).to(whole.dtype)
