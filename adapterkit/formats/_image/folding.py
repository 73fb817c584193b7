"""Scalings folded into factors, for dialects that have no place for them."""

from __future__ import annotations

from ...core.adapter import Target, Updates
from ...core.updates import Update
from .encode import folded, why_not
from .file import Rules


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
