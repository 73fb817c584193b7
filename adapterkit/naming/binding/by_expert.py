"""Match two adapters for the same mixture of experts, without the base.

One adapter changes stacks of experts, the other adapter changes single experts. The names and shapes of the adapter
with single experts replace those of the missing base. The functions try every family whose file has names for both the
stacks and the single experts; all families that fit must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...errors import AdapterkitError, UsageError
from ..architectures import with_stacks
from ..moves import Move
from ..resolver import resolve
from ..stored_names import Names
from .fitting import Shapes, fits, paths_of
from .moving import Placed, cut_rows, moved

Moves = dict[str, tuple[Move, ...]]


def by_expert(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Translate adapters of stacked experts to the names of an adapter that adapts the experts one by one.

    Args:
        adapters: adapters for the same unknown base.

    Returns:
        the adapters in the same order. An adapter is unchanged if no adapter has single experts. It is also unchanged
        if no family's file maps its stacks to the names of the first adapter with single experts.

    Raises:
        UsageError: two families map a stack to different names.
    """
    reference = next((adapter for adapter in adapters if _has_single_experts(adapter)), None)
    if reference is None:
        return list(adapters)
    shapes = _shapes(reference)
    names = Names(paths_of(shapes))
    return [a if a is reference or not _has_stacks(a) else _in_parts(a, names, shapes) for a in adapters]


def by_rows(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Split updates of a whole weight if another adapter has separate updates for its parts, such as gate and up.

    Args:
        adapters: adapters for one base, in its names.

    Returns:
        the adapters in the same order. An update is not split if the other adapters' parts do not cover all rows, or if
        the update's formula cannot be split.
    """
    spans: dict[str, set[tuple[int, int]]] = {}
    for adapter in adapters:
        for target in adapter.updates:
            if target.rows is not None:
                spans.setdefault(target.path, set()).add(target.rows)
    return [_at_rows(adapter, spans) for adapter in adapters] if spans else list(adapters)


def _at_rows(adapter: Adapter, spans: Mapping[str, set[tuple[int, int]]]) -> Adapter:
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, given in adapter.updates.items():
        rows = sorted(spans.get(target.path, ()))
        out = given[0].dims(target.stacked).get("out")
        tiles = [start for start, _ in rows] == [0, *(stop for _, stop in rows[:-1])] and rows and rows[-1][1] == out
        if target.rows is not None or not tiles or not all(update.cuts("out") for update in given):
            updates[target] = given
            continue
        for start, stop in rows:
            updates[replace(target, rows=(start, stop))] = tuple(
                cut_rows(update, start, stop, 1, target.stacked) for update in given
            )
    return adapter.replace(updates=updates)


def _has_single_experts(adapter: Adapter) -> bool:
    return any(
        word == "experts" and after.isdigit()
        for target in adapter.updates
        if not target.stacked
        for word, after in pairwise(target.path.split("."))
    )


def _has_stacks(adapter: Adapter) -> bool:
    return any(target.stacked for target in adapter.updates)


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return a map from each weight that an adapter changes to its shape `[out, in]`, as far as the updates show it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target, updates in adapter.updates.items():
        dims = updates[0].dims(target.stacked)
        out, in_ = dims.get("out"), dims.get("in")
        known = isinstance(out, int) and isinstance(in_, int) and not target.stacked
        shapes[f"{target.path}.weight"] = (out, in_) if known else ()  # type: ignore[assignment]
    return shapes


def _in_parts(adapter: Adapter, names: Names, shapes: Shapes) -> Adapter:
    """Split the stacks of one adapter into single experts, if the family files that fit agree on one result."""
    stacks = {target: updates for target, updates in adapter.updates.items() if target.stacked}
    found: dict[tuple[tuple[str, tuple[Move, ...]], ...], str] = {}
    paths = [target.path for target in stacks]
    for architecture in with_stacks(paths):
        try:
            moves = resolve(paths, names, architecture=architecture, partial=True).moves
            placed = moved(stacks, moves, shapes)
        except AdapterkitError:
            continue
        whole = all(_whole(target, given, moves) for target, given in stacks.items() if target.path in moves)
        if moves and whole and _fit(placed, shapes):
            found[tuple(sorted(moves.items()))] = architecture.family
    if not found:
        return adapter
    if len(found) > 1:
        why = f"the families {' and '.join(found.values())} split the experts differently"
        raise UsageError(
            why, where=str(next(iter(stacks))), cure="Give the base, which shows the family: --base (base=)"
        )
    (only,) = found
    parts: dict[Target, list[Placed]] = {}
    for each in moved(stacks, dict(only), shapes):
        parts.setdefault(each[0], []).append(each)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target, given in adapter.updates.items():
        places = parts.get(target, [(target, target, given)])
        updates |= {there: part for _, there, part in places}
    return adapter.replace(updates=updates)


def _whole(target: Target, updates: Sequence[Update], moves: Moves) -> bool:
    """Return whether every part of every expert in a stack has a destination."""
    given = moves[target.path]
    parts = {move.take for move in given}
    count = next((take.of for take in parts if take is not None), 1)
    experts = updates[0].dims(target.stacked).get("e")
    return len(parts) == count and {move.expert for move in given} == set(range(int(str(experts))))


def _fit(placed: Sequence[Placed], shapes: Shapes) -> bool:
    """Return whether every part has the shape of its destination."""
    return all(fits(there, updates, shapes[f"{there.path}.weight"]) for _, there, updates in placed)
