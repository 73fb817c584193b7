"""Targets of one naming in another: modules renamed, fused weights parted, pieces put together."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from ...adapter import Target, Updates
from ...methods.oft import OFT
from ...naming.image import Family, families_of, is_not_xl, is_xl, rooted, to_diffusers, to_native
from ...naming.pieces import Piece
from ...updates import Update
from .deciding import UNKNOWN, Origin, decide, denoiser_targets
from .fusing import Part, joined, parted

Changed = dict[Target, tuple[Update, ...]]
Losses = list[tuple[Target, str]]


def in_diffusers(updates: Updates, kept: Collection[str] = (), origin: Origin = UNKNOWN) -> tuple[Changed, Losses]:
    """Updates at modules of the native namings moved to those of diffusers; and those that cannot be, with the reason.

    Args:
        updates: the updates.
        kept: targets, as text, that stay as they are.
        origin: what is known of where their names come from.
    """
    changed: Changed = {}
    losses: Losses = []
    updates = {_module(target, kept): found for target, found in updates.items()}
    targets = set(denoiser_targets(updates, set(kept)))
    family, why = decide(updates, targets, "diffusers", origin) if targets else (None, "")
    for target, found in updates.items():
        _, rest = rooted(target.path)
        if target not in targets or family is None or rest in family.diffusers:
            losses += [(target, why)] if target in targets and why else []
            _add(changed, target, found)
            continue
        moved, reason = _parted(target, found, family)
        if reason:
            losses.append((target, reason))
            _add(changed, target, found)
        for place, update in moved:
            _add(changed, place, (update,))
    return changed, losses


def _module(target: Target, kept: Collection[str]) -> Target:
    """The module of a norm's scale: BFL's norms hold a `scale`, those of diffusers a `weight`."""
    path = target.path.removesuffix(".scale")
    scale = path != target.path and str(target) not in kept and families_of(rooted(path)[1], "native")
    return replace(target, path=path) if scale else target


def _parted(target: Target, found: tuple[Update, ...], family: Family) -> tuple[list[tuple[Target, Update]], str]:
    root, rest = rooted(target.path)
    root = "" if not root else f"{family.component}."
    pieces = to_diffusers(family, rest)
    if not pieces:
        return [], f"{family.name}: diffusers' name of this module is not known"
    if len(pieces) == 1 and pieces[0][0].there is None:
        return [(replace(target, path=root + pieces[0][1]), update) for update in found], ""
    if pieces[0][0].there is not None:
        turned = [_reordered(update, [(p.start, p.there or 0) for p, _ in pieces], pieces[0][0].of) for update in found]
        if None in turned or target.rows is not None:
            return [], "the order of its parts is another in diffusers, and they cannot be told apart"
        return [(replace(target, path=root + pieces[0][1]), u) for u in turned if u is not None], ""
    apart = target.rows is not None and all(isinstance(update, OFT) for update in found)
    if apart and (whole := next((each for each in pieces if _is(target.rows, each[0])), None)):
        return [(replace(target, path=root + whole[1], rows=None), update) for update in found], ""
    moved = []
    for update in found:
        spans = _spans(target, update, [piece for piece, _ in pieces])
        inside = [(span, each) for span, each in zip(spans, pieces, strict=True) if span is not None]
        parts = parted(update, [span for span, _ in inside]) if inside else None
        if parts is None:
            return [], f"{update.method} on a fused weight, which cannot be parted"
        places = [replace(target, path=root + name, rows=None) for _, (_, name) in inside]
        moved += list(zip(places, parts, strict=True))
    return moved, ""


def _is(rows: tuple[int, int] | None, piece: Piece) -> bool:
    """Whether rows are just those of a piece, however wide the fused weight is."""
    size = 0 if rows is None else rows[1] - rows[0]
    return rows is not None and size % piece.parts == 0 and rows[0] == piece.start * (size // piece.parts)


def _spans(target: Target, update: Update, pieces: list[Piece]) -> list[tuple[int, int] | None]:
    """The rows of each piece in the update's own counting; None for pieces that it does not reach."""
    dims = update.dims()
    out, in_ = dims.get("out"), dims.get("in")
    of = pieces[0].of
    start, full = (0, out) if target.rows is None else (target.rows[0], of * in_ if isinstance(in_, int) else None)
    if not isinstance(full, int) or not isinstance(out, int) or full % of:
        return [None for _ in pieces]
    unit = full // of
    spans = [(piece.start * unit - start, piece.stop * unit - start) for piece in pieces]
    kept = [span if span[0] >= 0 and span[1] <= out else None for span in spans]
    return kept if sum(span[1] - span[0] for span in kept if span) == out else [None for _ in pieces]


def _reordered(update: Update, moves: list[tuple[int, int]], of: int) -> Update | None:
    """An update of a weight whose equal parts go from one place to another; None where its law cannot be cut."""
    out = update.dims().get("out")
    if not isinstance(out, int) or out % of:
        return None
    unit = out // of
    parts = parted(update, [(here * unit, (here + 1) * unit) for here, _ in moves])
    if parts is None:
        return None
    pieces = [Piece("", there, there + 1, of) for _, there in moves]
    return joined([Part(piece, part) for piece, part in zip(pieces, parts, strict=True)], fold=False)[0]


def in_native(
    updates: Updates, kept: Iterable[str] = (), origin: Origin = UNKNOWN, *, fold: bool = False
) -> tuple[Changed, Losses]:
    """Updates at modules of diffusers' naming moved to the native ones; and those that cannot be, with the reason.

    Args:
        updates: the updates.
        kept: targets, as text, that stay as they are.
        origin: what is known of where their names come from.
        fold: scalings of parts that differ may go into B.
    """
    changed: Changed = {}
    losses: Losses = []
    targets = denoiser_targets(updates, set(kept))
    family, why = decide(updates, targets, "native", origin) if targets else (None, "")
    inside, paths = set(targets), [rooted(target.path)[1] for target in updates]
    groups: dict[tuple[str, str], list[tuple[Target, Piece, tuple[Update, ...]]]] = {}
    for target, found in updates.items():
        root, rest = rooted(target.path)
        if target not in inside or family is None or rest in family.native:
            losses += [(target, why)] if target in inside and why else []
            _add(changed, target, found)
            continue
        if there := _halves(to_native(family, rest)):
            moves, name = there
            turned = [_reordered(update, moves, len(moves)) for update in found]
            if None not in turned and target.rows is None:
                _add(changed, replace(target, path=root + name), tuple(u for u in turned if u is not None))
                continue
        places = _one_place(to_native(family, rest), paths)
        if len(places) != 1:
            several = "nothing tells which of several modules it is" if places else "its authors' naming is not known"
            losses.append((target, f"{family.name}: {several}"))
            _add(changed, target, found)
            continue
        ((piece, name),) = places
        groups.setdefault((root, name), []).append((target, piece, found))
    for (root, name), members in groups.items():
        losses += _gather(changed, f"{root}{name}", members, fold)
    return changed, losses


def _gather(changed: Changed, path: str, members: list[tuple[Target, Piece, tuple[Update, ...]]], fold: bool) -> Losses:
    """Adds the updates of the pieces of one native module."""
    first, piece, found = members[0]
    if piece.of == 1:
        _add(changed, replace(first, path=path), found)
        return []
    if any(len(each) != 1 for _, _, each in members):
        return [(first, "several updates on parts of a fused weight")]
    if all(isinstance(each[0], OFT) and Part(piece, each[0]).unit for _, piece, each in members):
        # A rotation of rows that does not reach the others; kohya has each part's blocks apart.
        for target, piece, each in members:
            unit = Part(piece, each[0]).unit
            _add(changed, replace(target, path=path, rows=(piece.start * unit, piece.stop * unit)), each)
        return []
    update, why = joined([Part(piece, each[0]) for _, piece, each in members], fold=fold)
    if update is None:
        for target, _, each in members:
            _add(changed, target, each)
        return [(target, why) for target, _, _ in members]
    _add(changed, Target(path), (update,))
    return []


def _halves(places: list[tuple[Piece, str]]) -> tuple[list[tuple[int, int]], str] | None:
    """Where the parts of a module go that is the same in both namings but for their order."""
    moves = [(piece.there, piece.start) for piece, _ in places if piece.there is not None]
    return (sorted(moves), places[0][1]) if moves and len(moves) == len(places) else None


def _one_place(places: list[tuple[Piece, str]], paths: list[str]) -> list[tuple[Piece, str]]:
    """The place among two: the upsampler of the first level is the third of its block in XL, else the second."""
    if len(places) < 2 or is_xl(paths) == is_not_xl(paths):
        return places
    return [each for each in places if each[1].endswith(".2.conv") == is_xl(paths)]


def _add(changed: Changed, target: Target, found: tuple[Update, ...]) -> None:
    changed[target] = (*changed.get(target, ()), *found)
