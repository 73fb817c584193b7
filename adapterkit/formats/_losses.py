"""Find updates that a format cannot express, and refuse or omit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import Unrepresentable

if TYPE_CHECKING:
    from ..core.adapter import Target, Updates
    from ..core.updates import Update

Loss = tuple["Target", int, str]
"""A target, the index of an update of this target, and the reason why the format cannot express the update."""


def expressible(
    updates: Updates, find: Callable[[Updates], Iterable[Loss]], *, dialect: str, place: str, on_loss: str
) -> tuple[Updates, list[str]]:
    """Return the updates that one file of the format can store together, and a line for each omitted update.

    Args:
        updates: the updates to write.
        find: a function that returns the updates that the format cannot express. It is called again on the remaining
            updates, until it returns no update.
        dialect: the format's name, for messages.
        place: a phrase for messages that names the output, such as "a file of this format".
        on_loss: `drop` omits updates that the format cannot express; every other value refuses them.

    Raises:
        Unrepresentable: some updates cannot be expressed and `on_loss` is not `drop`, or no update can be expressed.
    """
    lines: list[str] = []
    while losses := [*find(updates)]:
        items = [f"{target}: {why}" for target, _, why in losses]
        if on_loss != "drop":
            cure = "Omit them with --on-loss drop (on_loss='drop'), or write adapterkit's format: --to adapterkit"
            places = [(target, position) for target, position, _ in losses]
            raise Unrepresentable(f"{dialect} cannot express these updates", items=items, cure=cure, places=places)
        lines += [f"left out {item}" for item in items]
        updates = _without(updates, {(target, position) for target, position, _ in losses})
    if not updates:
        cure = "Write adapterkit's format: --to adapterkit (format='adapterkit')"
        raise Unrepresentable(f"{place} can express none of the adapter's updates", items=lines, cure=cure)
    return updates, lines


def _without(updates: Updates, lost: set[tuple[Target, int]]) -> dict[Target, tuple[Update, ...]]:
    kept = {t: tuple(u for i, u in enumerate(found) if (t, i) not in lost) for t, found in updates.items()}
    return {target: found for target, found in kept.items() if found}
