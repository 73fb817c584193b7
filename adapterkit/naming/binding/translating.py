"""Translate an adapter to a naming of its family, without a base; for writers of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...core.adapter import Target
from ...core.updates import Update
from ..architectures import Architecture
from ..by_family import translate
from ..moves import Move
from .moving import moved


def moves_of(
    updates: Mapping[Target, tuple[Update, ...]], architecture: Architecture, naming: str
) -> dict[str, tuple[Move, ...]]:
    """Find the destinations of each target's parts in a naming; targets that the naming does not have are omitted.

    Raises:
        TargetNotFound: two readings of a name lead to different weights.
    """
    found = {}
    for target, given in updates.items():
        moves = translate(target.path, architecture, naming, _experts(target, given))
        if moves is not None:
            found[target.path] = moves
    return found


def translated(
    updates: Mapping[Target, tuple[Update, ...]],
    moves: Mapping[str, tuple[Move, ...]],
    experts: int = 0,
    config: Mapping[str, object] | None = None,
) -> dict[Target, tuple[Update, ...]]:
    """Apply the moves of `moves_of` to updates: split at fused weights, join into stacks or split stacks.

    Args:
        updates: the updates by target; updates without moves are omitted.
        moves: the destinations of each target's parts, by the target's path.
        experts: the number of experts in a stack; 0 for as many as the updates need.
        config: the base's config; its heads determine how a fused projection is divided.

    Raises:
        NotMergeable, ShapeMismatch, Unsupported: an update cannot be split or joined.
    """
    found: dict[Target, tuple[Update, ...]] = {}
    for target, there, given in moved(updates, moves, _shapes(updates, moves, experts), config):
        # Use the layout [out, in] for stacks: only some families' own naming stores experts as [in, out].
        layout = "e out *in" if there.stacked else "out *in"
        there = replace(there, layout=layout) if target.stacked else there
        found[there] = (*found.get(there, ()), *given)
    return found


def _experts(target: Target, updates: tuple[Update, ...]) -> int:
    count = updates[0].dims(True).get("e") if target.stacked else 0
    return count if isinstance(count, int) else 0


def _shapes(
    updates: Mapping[Target, tuple[Update, ...]], moves: Mapping[str, tuple[Move, ...]], experts: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape `[e, out, in]` or `[out, in]` of each destination, as far as the updates show it."""
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for target, given in updates.items():
        dims: dict[str, Any] = dict(given[0].dims(target.stacked))
        for move in moves.get(target.path, ()):
            out = dims.get("out")
            if isinstance(out, int):
                cut = move.take.of if move.take and target.rows is None else 1
                out = out // cut * (move.into.of if move.into else 1)
            counts[move.path] = max(counts.get(move.path, experts), 0 if move.slot is None else move.slot + 1)
            lead = (dims["e"],) if target.stacked and move.expert is None else ()
            shapes[move.path] = (*lead, out or 0, dims.get("in") or 0)
    return {
        path: (counts[path], *shape) if counts[path] and len(shape) == 2 and _slotted(path, moves) else shape
        for path, shape in shapes.items()
    }


def _slotted(path: str, moves: Mapping[str, tuple[Move, ...]]) -> bool:
    return any(move.path == path and move.slot is not None for given in moves.values() for move in given)
