"""What a dialect of many methods has no words for: refused with the list, or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import Unrepresentable

if TYPE_CHECKING:
    from ..core.adapter import Target, Updates
    from ..core.updates import Update

Loss = tuple["Target", int, str]
"""Target, position among its updates, and why it cannot be said."""


def expressible(
    updates: Updates, find: Callable[[Updates], Iterable[Loss]], *, dialect: str, place: str, on_loss: str
) -> tuple[Updates, list[str]]:
    """The updates that a dialect can say beside each other, and a line for each that was left out.

    Args:
        updates: what is to be written.
        find: what cannot be said of some updates; asked again about those that are left.
        dialect: whose words they are, for messages.
        place: what is written, for messages.
        on_loss: `drop` leaves them out.

    Raises:
        Unrepresentable: some cannot be said and `on_loss` is not `drop`, or none can.
    """
    lines: list[str] = []
    while losses := [*find(updates)]:
        items = [f"{target}: {why}" for target, _, why in losses]
        if on_loss != "drop":
            cure = "Drop them with on_loss='drop'/--on-loss drop, or write adapterkit's own format"
            places = [(target, position) for target, position, _ in losses]
            raise Unrepresentable(f"{dialect} has no words for these updates", items=items, cure=cure, places=places)
        lines += [f"left out {item}" for item in items]
        updates = _without(updates, {(target, position) for target, position, _ in losses})
    if not updates:
        cure = "Write adapterkit's own"
        raise Unrepresentable(f"nothing of this adapter fits {place}", items=lines, cure=cure)
    return updates, lines


def _without(updates: Updates, lost: set[tuple[Target, int]]) -> dict[Target, tuple[Update, ...]]:
    kept = {t: tuple(u for i, u in enumerate(found) if (t, i) not in lost) for t, found in updates.items()}
    return {target: found for target, found in kept.items() if found}
