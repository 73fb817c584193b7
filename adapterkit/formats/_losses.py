"""Refuse updates that a format cannot express, with a list of them, or leave them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import Unrepresentable

if TYPE_CHECKING:
    from ..core.adapter import Target, Updates
    from ..core.updates import Update

Loss = tuple["Target", int, str]
"""Target, position among its updates, and the reason why the format cannot express it."""


def expressible(
    updates: Updates, find: Callable[[Updates], Iterable[Loss]], *, dialect: str, place: str, on_loss: str
) -> tuple[Updates, list[str]]:
    """Return the updates that a format can express together, and a line for each that was left out.

    Args:
        updates: the updates to write.
        find: finds the updates that cannot be expressed; called again on those that remain.
        dialect: the format's name, for messages.
        place: what is written, such as a file of this format, for messages.
        on_loss: `drop` leaves such updates out.

    Raises:
        Unrepresentable: some cannot be expressed and `on_loss` is not `drop`, or none can.
    """
    lines: list[str] = []
    while losses := [*find(updates)]:
        items = [f"{target}: {why}" for target, _, why in losses]
        if on_loss != "drop":
            cure = "Drop them with on_loss='drop'/--on-loss drop, or write adapterkit's own format"
            places = [(target, position) for target, position, _ in losses]
            raise Unrepresentable(f"{dialect} cannot express these updates", items=items, cure=cure, places=places)
        lines += [f"left out {item}" for item in items]
        updates = _without(updates, {(target, position) for target, position, _ in losses})
    if not updates:
        cure = "Write adapterkit's own"
        raise Unrepresentable(f"nothing of this adapter fits {place}", items=lines, cure=cure)
    return updates, lines


def _without(updates: Updates, lost: set[tuple[Target, int]]) -> dict[Target, tuple[Update, ...]]:
    kept = {t: tuple(u for i, u in enumerate(found) if (t, i) not in lost) for t, found in updates.items()}
    return {target: found for target, found in kept.items() if found}
