"""Updates rewritten for formats that have no place for them: scalings go into factors, changes of zero are left out."""

from __future__ import annotations

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...io.lazy import NotComputed, as_array, as_lazy
from ...methods.dense import Dense
from .encode import folded, why_not
from .file import Rules


def without_effect(updates: Updates, rules: Rules) -> tuple[Updates, list[str]]:
    """The updates without changes of zero that the format cannot say, and a line for each.

    Extracted LoRAs of Wan have such a `diff` for every norm.
    """
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        kept = tuple(update for update in found if not (why_not(update, rules) and _is_zero(update)))
        if len(kept) < len(found):
            lines.append(f"left out {target}: its change is zero")
        if kept:
            changed[target] = kept
    return changed, lines


def _is_zero(update: Update) -> bool:
    """Whether a dense change is known to be zero; one that is still to be computed is not."""
    try:
        return isinstance(update, Dense) and not any(as_array(as_lazy(leaf)).any() for leaf in update.tensors.values())
    except NotComputed:
        return False


def rewritten(updates: Updates, rules: Rules, on_loss: str) -> tuple[Updates, list[str]]:
    """Scalings folded, where that is allowed and needed, and a line for each."""
    if on_loss not in ("fold", "promote"):
        return updates, []
    lines: list[str] = []
    changed: dict[Target, tuple[Update, ...]] = {}
    for target, found in updates.items():
        changed[target] = tuple(_rewrite(target, update, rules, lines) for update in found)
    return changed, lines


def _rewrite(target: Target, update: Update, rules: Rules, lines: list[str]) -> Update:
    other = folded(update, rules) if why_not(update, rules) else update
    if other is update or why_not(other, rules):
        return update
    lines.append(f"folded the scaling into a factor of {target}")
    return other
