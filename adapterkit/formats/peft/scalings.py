"""Write ranks and scalings as config fields: one rank and one alpha for most modules, patterns for all others.

PEFT stores no scaling: it divides an alpha by the rank or its square root. The writer looks for an alpha that yields
the exact scaling. If there is none, the scaling is folded into B, if the caller allows it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from ...errors import Unrepresentable
from ...io.lazy import as_torch
from ...methods.olora import OLoRA
from .._format import FORMULA
from .alphas import Scale
from .alphas import number_fields as scale_fields
from .families import family_of_method
from .losses import acting_method
from .pairs import OUTPUT_TIMES, PAIRS, rank_of
from .spelling import config_name, lora_paths

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...core.updates import Update
    from ...io.lazy import Leaf
    from ...io.strict_json import JsonValue
    from .hints import PeftHints


def number_fields(updates: Updates, hints: PeftHints, on_loss: str) -> tuple[Updates, dict[str, JsonValue], list[str]]:
    """Return the fields for ranks and scalings; fold a scaling that no alpha yields into B, if this is allowed."""
    updates, lines = _family_folded(updates, on_loss)
    if lines:
        return updates, {}, lines
    first, paths = hints.config.get("use_rslora") is True, lora_paths(updates)
    once = hints.compat == FORMULA
    scales, unlike = _scales(updates, once)
    numbers, inexact = scale_fields(scales, (first, not first))
    inexact += unlike
    if not inexact:
        return updates, numbers, []
    needy = [target for target in updates if target.path in paths and config_name(target, paths) in inexact]
    items = [f"{target}: no alpha yields its exact scaling" for target in needy]
    if on_loss not in ("fold", "promote") or any(isinstance(u, OLoRA) for target in needy for u in updates[target]):
        raise Unrepresentable(
            "PEFT states a scaling as alpha / r",
            items=items,
            cure="Allow folding it into B with --on-loss fold (on_loss='fold')",
        )
    changed = {
        t: tuple(_folded(update, _times_added(t, paths, once)) for update in found) if t in needy else found
        for t, found in updates.items()
    }
    numbers, _ = scale_fields(_scales(changed, once)[0], (first, not first))
    return changed, numbers, [f"folded the scaling into B of {target}" for target in needy]


def _family_folded(updates: Updates, on_loss: str) -> tuple[Updates, list[str]]:
    """Fold scalings that a family's config cannot state into a tensor of the family."""
    method = acting_method(updates)
    family = family_of_method(method)
    needy = family.inexact(updates) if family else []
    if family is None or not needy:
        return updates, []
    items = [f"{path}: no alpha yields its exact scaling" for path in needy]
    if on_loss not in ("fold", "promote"):
        raise Unrepresentable(
            "PEFT states a scaling as alpha / r",
            items=items,
            cure="Allow folding it into a factor with --on-loss fold (on_loss='fold')",
        )

    def folded(update: Update) -> Update:
        field = next((name for name in family.folds if name in update.tensors), None)
        if type(update) not in family.methods() or field is None:
            return update
        scaled = _times(update.tensors[field], update.attributes["scaling"])
        return update.replace(scaling=1.0, **{field: scaled})

    changed = {t: tuple(map(folded, found)) if t.path in needy else found for t, found in updates.items()}
    return changed, [f"folded the scaling into a factor of {path}" for path in needy]


def _scales(updates: Updates, once: bool) -> tuple[dict[str, Scale], list[str]]:
    """Return rank and scaling by name in the config, and the names of attentions that would need two alphas."""
    paths, scales, unlike = lora_paths(updates), dict[str, Scale](), dict[str, None]()
    for target, found in updates.items():
        for update in (update for update in found if isinstance(update, PAIRS)):
            scaling = float(cast(Any, update).scaling) / _times_added(target, paths, once)
            scale, name = (rank_of(update, target.stacked), scaling), config_name(target, paths)
            if scales.setdefault(name, scale) != scale:
                unlike[name] = None
    return scales, list(unlike)


def _times_added(target: Target, paths: Collection[str], once: bool) -> float:
    """Return how many times PEFT's forward adds the change of a target; `once` is for the paper's formula."""
    inside = config_name(target, paths) != target.path and target.path.endswith(".out_proj")
    return OUTPUT_TIMES if inside and not once else 1.0


def _folded(update: Update, scaling: float) -> Update:
    """Give an update another scaling without changing its function; the factors are rounded once, to their dtype."""
    if not isinstance(update, PAIRS) or isinstance(update, OLoRA):
        return update
    scaled = {name: update.tensors[name] for name in ("B", "B_blocks", "bias") if name in update.tensors}
    factor = update.scaling / scaling
    return update.replace(scaling=scaling, **{name: _times(leaf, factor) for name, leaf in scaled.items()})


def _times(leaf: Leaf, scaling: float) -> Leaf:
    import torch

    whole = as_torch(leaf)
    return (whole.to(torch.float64) * scaling).to(whole.dtype)
