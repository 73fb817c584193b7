"""Translate targets from one naming to another: rename modules, split fused weights, join parts of fused weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...methods.lokr import LoKr
from ...methods.oft import OFT
from ...naming.image import FUSED, ImageFamily, families_of, rooted
from ...naming.pieces import Piece, Run
from .deciding import CONTROLNET, UNKNOWN, Origin, decide, denoiser_targets
from .fusing import FusedPart, joined, outputs_of, parted

Changed = dict[Target, tuple[Update, ...]]
Losses = list[tuple[Target, str]]


def in_diffusers(
    updates: Updates, kept: Collection[str] = (), origin: Origin = UNKNOWN, *, fuse: bool = True
) -> tuple[Changed, Losses]:
    """Translate to diffusers' naming; see `in_naming`."""
    return in_naming(updates, "diffusers", kept, origin, fuse=fuse)


def in_naming(
    updates: Updates, naming: str, kept: Collection[str] = (), origin: Origin = UNKNOWN, *, fold: bool = False,
    fuse: bool = True, rows: bool = False,
) -> tuple[Changed, Losses]:  # fmt: skip
    """Translate targets in a U-Net or a transformer to another naming.

    Args:
        updates: the updates by target.
        naming: the naming to translate to; `kohya` is the naming whose dots sd-scripts replaces by underscores.
        kept: the targets, as text, that must not be renamed.
        origin: what is known about the naming of the targets.
        fold: whether joining parts with different scalings may fold the scalings into B.
        fuse: whether a LoKr of a fused weight becomes an update of the fused module that diffusers creates for LoKr. If
            false, the LoKr is split.
        rows: whether an update of some rows of a fused weight may stay an update of these rows. If false, zeros are
            added for the other rows.

    Returns:
        the translated updates, and (target, reason) for each target that cannot be translated and stays unchanged.
    """
    # Name a norm by its module, not by its scale: only BFL's naming uses the scale, others use the module's weight.
    updates = {_module(target, kept): found for target, found in updates.items()}
    targets = set(denoiser_targets(updates, set(kept)))
    family, why = decide(updates, targets, naming, origin) if targets else (None, "")
    if family is None:
        return dict(updates), [(target, why) for target in updates if target in targets and why]
    into = _Into(family, family.wanted(naming), fold, fuse)
    source = family.naming_of([rooted(target.path)[1] for target in targets], origin.naming)
    if family.wanted(origin.naming) not in family.namings and into.naming in family.namings:
        # If the names fit both namings, assume that they are already in the requested naming, unless `origin` says
        # otherwise.
        source = family.naming_of([rooted(target.path)[1] for target in targets], into.naming)
    for target, found in updates.items():
        if target not in targets:
            into.keep(target, found)
        elif rows or target.rows is None or into.naming == "diffusers" or any(isinstance(u, OFT) for u in found):
            into.add(target, found, source)
        else:
            # XLabs adapts only the first three sevenths of linear1. Split such an update into parts, and add zeros for
            # the rest.
            named = replace(origin, families=(family.name,))
            parts, lost = in_naming({target: found}, "diffusers", (), named, fuse=False)
            for part, each in parts.items():
                into.add(part, each, "" if lost else "diffusers")
    into.gather()
    return into.changed, into.losses


def _module(target: Target, kept: Collection[str]) -> Target:
    """Remove `.scale` from a norm's target in BFL's naming, because diffusers' naming ends at the norm's module."""
    path = target.path.removesuffix(".scale")
    scale = path != target.path and str(target) not in kept and families_of(rooted(path)[1], "native")
    return replace(target, path=path) if scale else target


@dataclass
class _Member:
    """An update of some rows of a fused weight in the requested naming, and the target from which it came."""

    origin: Target
    run: Run
    update: Update


@dataclass
class _Into:
    """Collects the translated updates of one family."""

    family: ImageFamily
    naming: str
    fold: bool
    fuse: bool
    changed: Changed = field(default_factory=dict)
    losses: Losses = field(default_factory=list)
    groups: dict[str, list[_Member]] = field(default_factory=dict)
    origins: dict[Target, tuple[Update, ...]] = field(default_factory=dict)

    def keep(self, target: Target, found: tuple[Update, ...]) -> None:
        self.changed[target] = (*self.changed.get(target, ()), *found)

    def lose(self, target: Target, found: tuple[Update, ...], why: str) -> None:
        self.losses.append((target, why))
        self.keep(target, found)

    def add(self, target: Target, found: tuple[Update, ...], source: str) -> None:
        """Rename one target, or record its updates as parts of a fused weight that `gather` joins.

        Args:
            target: the target to rename.
            found: the target's updates.
            source: the current naming of all targets; empty if the targets have several namings.
        """
        root, rest = rooted(target.path)
        if self.family.component == CONTROLNET and self.naming == "diffusers" and not root:
            return self.keep(replace(target, path=f"{CONTROLNET}.{rest}"), found)
        if not source and rest in self.family.names(self.naming):
            source = self.naming
        source = source or self.family.naming_of([rest])
        if source == self.naming:
            return self.keep(target, found)
        pieces = self.family.moves(rest, source, self.naming, ratio_of(target, found))
        root = self._root(root)
        if not pieces:
            words = {"native": "its authors'", "comfyui": "ComfyUI's", "diffusers": "diffusers'"}.get(
                self.naming, f"the {self.naming}"
            )
            return self.lose(target, found, f"{words} name of this module of {self.family.title} is unknown")
        first = pieces[0]
        if len(pieces) == 1 and first.here.whole and first.there.whole:
            return self.keep(replace(target, path=root + first.path), found)
        if _is_order(pieces):
            turned = [reordered(update, pieces) for update in found]
            if None in turned or target.rows is not None:
                return self.lose(
                    target, found, "in that naming, the weight's parts have another order; the update cannot be split"
                )
            return self.keep(replace(target, path=root + first.path), tuple(u for u in turned if u is not None))
        return self._part(target, found, pieces, root, source)

    def _root(self, root: str) -> str:
        """Return the component as diffusers names it, if the requested naming is diffusers'; otherwise `root`."""
        if self.naming != "diffusers" or root in ("", "transformer_2."):
            return root
        return f"{self.family.component}."

    def _fused(self, target: Target, found: tuple[Update, ...], source: str) -> str | None:
        """Return the fused module that diffusers creates for a LoKr: diffusers cannot load a LoKr that was split."""
        if (
            not self.fuse
            or self.naming != "diffusers"
            or target.rows is not None
            or not all(isinstance(u, LoKr) for u in found)
        ):
            return None
        rest = rooted(target.path)[1]
        pieces = self.family.moves(rest, source, FUSED) if FUSED in self.family.namings else ()
        return pieces[0].path if len(pieces) == 1 and pieces[0].here.whole and pieces[0].there.whole else None

    def _part(
        self, target: Target, found: tuple[Update, ...], pieces: tuple[Piece, ...], root: str, source: str
    ) -> None:
        if target.rows is not None and all(isinstance(update, OFT) for update in found):
            exact = next((each for each in pieces if _is(target.rows, each.here) and each.there.whole), None)
            if exact is not None:
                return self.keep(replace(target, path=root + exact.path, rows=None), found)
        fused = self._fused(target, found, source)
        if fused is not None:
            return self.keep(replace(target, path=root + fused), found)
        parts: list[tuple[Piece, Update]] = []
        for update in found:
            if len(pieces) == 1 and pieces[0].here.whole:
                parts.append((pieces[0], update))
                continue
            if target.rows is None and outputs_of(update) is None and update.cuts("out"):
                # An update of inputs acts on all rows in the same way. So every part has the same update.
                parts += [(piece, update) for piece in pieces]
                continue
            spans = _spans(target, update, pieces)
            inside = [(span, piece) for span, piece in zip(spans, pieces, strict=True) if span is not None]
            cut = parted(update, [span for span, _ in inside]) if inside else None
            if cut is None:
                return self.lose(
                    target, found, f"{update.method} on a fused weight cannot be split into the weight's parts"
                )
            parts += [(piece, part) for (_, piece), part in zip(inside, cut, strict=True)]
        self.origins[target] = found
        for piece, update in parts:
            path = root + piece.path
            if piece.there.whole:
                self.keep(replace(target, path=path, rows=None), (update,))
            else:
                self.groups.setdefault(path, []).append(_Member(target, piece.there, update))
        return None

    def gather(self) -> None:
        """Join the parts of each fused weight."""
        for path, members in self.groups.items():
            update, why = self._joined(path, members)
            if update is not None:
                self.keep(Target(path), (update,))
            elif why:
                for target in dict.fromkeys(member.origin for member in members):
                    self.lose(target, self.origins[target], why)

    def _joined(self, path: str, members: list[_Member]) -> tuple[Update | None, str]:
        parts = [FusedPart(member.run, member.update) for member in members]
        if len({(member.run.start, member.run.stop) for member in members}) < len(members):
            return None, "a part of a fused weight has several updates"
        if all(isinstance(part.update, OFT) and part.unit for part in parts):
            # Keep the rotations of the parts separate: a rotation affects only the rows of its part, and kohya's format
            # stores each rotation.
            for member, part in zip(members, parts, strict=True):
                rows = (part.run.start * part.unit, part.run.stop * part.unit)
                self.keep(replace(member.origin, path=path, rows=rows), (member.update,))
            return None, ""
        return joined(parts, fold=self.fold)


def ratio_of(target: Target, found: tuple[Update, ...]) -> float | None:
    """Return the adapted weight's number of outputs divided by its number of inputs; None if a shape is unknown."""
    for update in found:
        dims = update.dims(target.stacked)
        out, in_ = outputs_of(update), dims.get("in", dims.get("columns"))
        if out and isinstance(in_, int) and in_ and target.rows is None:
            return out / in_
    return None


def _is_order(pieces: tuple[Piece, ...]) -> bool:
    """Whether the module is the same in both namings, except that its rows have another order."""
    first = pieces[0]
    whole = len({piece.path for piece in pieces}) == 1 and sum(p.there.parts for p in pieces) == first.there.of
    return whole and len(pieces) > 1


def _is(rows: tuple[int, int] | None, run: Run) -> bool:
    """Whether `rows` are the rows of `run` for some size of the fused weight, because this size is unknown."""
    size = 0 if rows is None else rows[1] - rows[0]
    return rows is not None and size % run.parts == 0 and rows[0] == run.start * (size // run.parts)


def _spans(target: Target, update: Update, pieces: tuple[Piece, ...]) -> list[tuple[int, int] | None]:
    """Return the rows of each piece, relative to the update's first row; None for a piece that the update lacks."""
    dims = update.dims()
    out, in_ = outputs_of(update), dims.get("in")
    of = pieces[0].here.of
    start, full = (0, out) if target.rows is None else (target.rows[0], of * in_ if isinstance(in_, int) else None)
    if not isinstance(full, int) or not isinstance(out, int) or full % of:
        return [None for _ in pieces]
    unit = full // of
    spans = [(piece.here.start * unit - start, piece.here.stop * unit - start) for piece in pieces]
    kept = [span if span[0] >= 0 and span[1] <= out else None for span in spans]
    return kept if sum(span[1] - span[0] for span in kept if span) == out else [None for _ in pieces]


def reordered(update: Update, pieces: tuple[Piece, ...]) -> Update | None:
    """Put the equal parts of an update's rows into another order; None if the update cannot be split."""
    out, of = outputs_of(update), pieces[0].here.of
    if out is None or out % of:
        return None
    unit = out // of
    parts = parted(update, [(piece.here.start * unit, piece.here.stop * unit) for piece in pieces])
    if parts is None:
        return None
    return joined([FusedPart(piece.there, part) for piece, part in zip(pieces, parts, strict=True)], fold=False)[0]
