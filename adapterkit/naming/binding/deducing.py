"""Deduce the family of a base without a config: try every family's file, and compare names and shapes.

A folder of plain shards has no `model_type`. Its names, such as `mlp.experts.0.up_proj`, often belong to several
families. That is no problem if all of them map an adapter's targets to the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...core.adapter import LAYOUTS, Target
from ...core.updates import Update
from ...errors import AdapterkitError, TargetNotFound, UsageError
from ..architectures import Architecture, architecture_of, shape_of, with_names
from ..layouts import stored_in_out
from ..moves import Move
from ..parts import exchangeable
from ..resolver import resolve
from ..stored_names import Names
from .fitting import Shapes, fits
from .moving import moved

Updates = Mapping[Target, tuple[Update, ...]]
Reading = tuple[tuple[str, tuple[Move, ...]], ...]


def deduced(updates: Updates, names: Names, shapes: Shapes, families: Sequence[str] = ()) -> Architecture | None:
    """Find the family whose file maps the targets to weights with fitting shapes.

    Args:
        updates: the targets that are not found yet, with their updates.
        names: the base's names.
        shapes: the shapes of the base's tensors, by name.
        families: the base's possible model types that the adapter states; if empty, all families are tried.

    Returns:
        the family that maps the most targets; the first one if several map them alike; None if none maps any.

    Raises:
        TargetNotFound: two families map the targets differently, and shapes fit both.
        UsageError: the only family that fits divides a fused projection by heads, whose numbers only a config states.
    """
    some = _one_of_each_form(updates)
    readings: dict[Reading, list[Architecture]] = {}
    heads: UsageError | None = None
    every = [known for name in families if (known := architecture_of({"model_type": name})) is not None]
    for architecture in every or with_names(target.path for target in some):
        try:
            reading = _reading(some, names, shapes, architecture)
        except UsageError as error:
            heads = heads or error
            continue
        except AdapterkitError:
            continue
        # Check encoders and decoders: with the base's prefixes, a family's file could map an encoder to a decoder.
        if reading and (every or all(_may_be(path, move.path) for path, moves in reading for move in moves)):
            readings.setdefault(reading, []).append(architecture)
    most = max(map(len, readings), default=0)
    best = {reading: known for reading, known in readings.items() if len(reading) == most}
    if len(best) > 1:
        raise _ambiguous(best)
    if not best:
        if heads is not None:
            raise heads
        return None
    (alike,) = best.values()
    return alike[0]


def _one_of_each_form(updates: Updates) -> Updates:
    """Keep one target for each name without numbers, because layers and experts are alike and very many."""
    some: dict[str, Target] = {}
    for target in updates:
        some.setdefault(shape_of(target.path), target)
    return {target: updates[target] for target in some.values()}


def _reading(updates: Updates, names: Names, shapes: Shapes, architecture: Architecture) -> Reading:
    """Return the moves that a family's file implies for the targets that it knows; empty if a shape does not fit."""
    paths = [target.path for target in updates]
    moves = resolve(paths, names, architecture=architecture, partial=True).moves
    placed = moved(updates, moves, shapes)
    # Check the family's own layout: one that stores [expert, in, out] cannot fit a base with [expert, out, in].
    config = {"model_type": architecture.record.model_types[0]}
    fit = all(_fits(there, given, shapes, bool(stored_in_out(there.path, config))) for _, there, given in placed)
    return tuple(sorted(moves.items())) if fit else ()


def _may_be(name: str, place: str) -> bool:
    """Whether two names may mean the same module, judged by the words before their common ending."""
    ours, theirs = name.split("."), place.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return not ours or not theirs or exchangeable(".".join([*ours, ""]), ".".join([*theirs, ""]))


def _fits(target: Target, updates: tuple[Update, ...], shapes: Shapes, in_out: bool) -> bool:
    name = f"{target.path}.weight" if f"{target.path}.weight" in shapes else target.path
    start = ("e in" if in_out else "e ") if target.stacked else ("in", "out")
    layouts = (layout for layout in LAYOUTS if layout.startswith(start))
    return name not in shapes or any(fits(replace(target, layout=layout), updates, shapes[name]) for layout in layouts)


def _ambiguous(readings: Mapping[Reading, list[Architecture]]) -> TargetNotFound:
    """Return the error for two readings; it names the first target that they map differently, and both results."""
    (one, first), (other, second), *_ = readings.items()
    target = next((path for path, moves in one if dict(other).get(path) != moves), one[0][0])
    texts = [
        f"{_said(dict(reading).get(target, ()))} as in {_listed(each.family for each in known)}"
        for reading, known in ((one, first), (other, second))
    ]
    return TargetNotFound(
        f"the base has no config.json that names its family, and two families fit: {' or '.join(texts)}", where=target,
        cure=f"Name it with --rename family:{first[0].family} or --rename family:{second[0].family} (rename=), or "
        'put a config.json with its "model_type" next to the shards',
    )  # fmt: skip


def _said(moves: Sequence[Move]) -> str:
    """Return a phrase that names the destinations of the first parts."""
    return " and ".join(_parts(moves[:2])) or "nowhere"


def _parts(moves: Sequence[Move]) -> Iterator[str]:
    for move in moves:
        rows: Any = move.take or move.into
        which = (
            "" if rows is None else f", part {rows.number + 1} of {rows.of}{' row by row' if rows.interleaved else ''}"
        )
        yield f"{move.path}{which}"


def _listed(families: Iterable[str]) -> str:
    every = list(families)
    return ", ".join(every[:3]) + (" and others" if len(every) > 3 else "")
