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
    """Map each target to its names in another naming. The result lacks targets that the naming does not have.

    Raises:
        TargetNotFound: a name can mean two different weights.
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
    """Apply the result of `moves_of` to the updates: split updates of fused weights, and join or split stacks.

    Args:
        updates: the updates by target. The result lacks updates without moves.
        moves: the result of `moves_of`.
        experts: the number of experts in a stack; 0 for as many as the updates need.
        config: the base's config. Its numbers of heads determine the sizes of the parts of a fused projection.

    Raises:
        NotMergeable, ShapeMismatch, Unsupported: an update cannot be split or joined.
    """
    found: dict[Target, tuple[Update, ...]] = {}
    for target, there, given in moved(updates, moves, _shapes(updates, moves, experts), config):
        # Use the layout [e, out, in] for stacks: only some families store experts as [e, in, out], and only in their
        # own naming.
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
    """Return the shape of each destination, `[out, in]` or for a stack `[e, out, in]`, as far as updates show it."""
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
