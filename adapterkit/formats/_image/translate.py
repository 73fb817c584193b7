"""Translate an adapter's targets to another naming: rename them, and split or join updates of fused weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...errors import UsageError
from ...io.arrange import times
from ...io.lazy import DTYPES, Lazy, as_array, as_lazy
from ...methods.dense import Dense
from ...methods.dora import DoRA
from ...methods.lokr import LoKr
from ...methods.lora import LoRA
from ...methods.oft import OFT
from ...naming.image import FUSED, ImageFamily, Piece, Run, component_of, families_of, rooted
from ...naming.image import families as all_families
from .deciding import CONTROLNET, UNKNOWN, Origin, decide, denoiser_targets, families_of_all, module_of
from .hints import fingerprint

if TYPE_CHECKING:
    from ...io.lazy import Leaf


Changed = dict[Target, tuple[Update, ...]]
Losses = list[tuple[Target, str]]


def in_diffusers(
    updates: Updates, kept: Collection[str] = (), origin: Origin = UNKNOWN, *, fuse: bool = True
) -> tuple[Changed, Losses]:
    """Translate to diffusers' naming; see `in_naming`."""
    return in_naming(updates, "diffusers", kept, origin, fuse=fuse)


def in_naming(
    updates: Updates, naming: str, kept: Collection[str] = (), origin: Origin = UNKNOWN, *, fold: bool = False,
    fuse: bool = True, rows: bool = False, for_base: bool = False,
) -> tuple[Changed, Losses]:  # fmt: skip
    """Translate targets in a U-Net or a transformer to another naming.

    Args:
        updates: the updates by target.
        naming: the naming to translate to. `kohya` means the dotted names that sd-scripts flattens with underscores.
        kept: the targets, as text, that must not be renamed.
        origin: what is known about the naming of the targets.
        fold: whether joining parts with different scalings may fold the scalings into B.
        fuse: whether a LoKr of a fused weight stays one update. Its target is then the fused module that diffusers
            creates for LoKr. If false, the LoKr is split.
        rows: whether an update may change only some rows of a fused weight. If false, zeros are added for the other
            rows.
        for_base: whether the updates are for a base instead of a file. If true, updates of parts that cannot be joined
            become updates of some rows of the fused weight. And a LoKr of a fused weight becomes differences of the
            parts, if the parts end inside a block of the Kronecker product. If false, neither is translated.

    Returns:
        the translated updates, and (target, reason) for each target that cannot be translated and stays unchanged.
    """
    # BFL's naming appends the parameter's name, `.scale`, to the path of a norm. Other namings do not, so remove it.
    updates = {_module(target, kept): group for target, group in updates.items()}
    targets = set(denoiser_targets(updates, set(kept)))
    family, why = decide(updates, targets, naming, origin) if targets else (None, "")
    if family is None:
        return dict(updates), [(target, why) for target in updates if target in targets and why]
    into = _Into(family, family.wanted(naming), fold, fuse, for_base)
    source = family.naming_of([rooted(target.path)[1] for target in targets], origin.naming)
    if family.wanted(origin.naming) not in family.namings and into.naming in family.namings:
        # If the names fit several namings, and `origin` does not tell the naming, assume that the names are already in
        # the requested naming.
        source = family.naming_of([rooted(target.path)[1] for target in targets], into.naming)
    for target, group in updates.items():
        if target not in targets:
            into.keep(target, group)
        elif rows or target.rows is None or into.naming == "diffusers" or any(isinstance(u, OFT) for u in group):
            into.add(target, group, source)
        else:
            # XLabs adapts only three sevenths of linear1's rows. Split such an update into updates of the modules that
            # diffusers has for these rows. When these updates are joined, the other rows get zeros.
            named = replace(origin, families=(family.name,))
            parts, lost = in_naming({target: group}, "diffusers", (), named, fuse=False, for_base=for_base)
            for part, each in parts.items():
                into.add(part, each, "" if lost else "diffusers")
    into.gather()
    return into.changed, into.losses


def _module(target: Target, kept: Collection[str]) -> Target:
    """Remove `.scale` from a norm's target in BFL's naming, so that the target is the norm's module."""
    path = target.path.removesuffix(".scale")
    scale = path != target.path and str(target) not in kept and families_of(rooted(path)[1], "native")
    return replace(target, path=path) if scale else target


@dataclass
class _Member:
    """An update of some rows (`run`) of a fused weight. `origin` is the target before the translation."""

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
    for_base: bool
    changed: Changed = field(default_factory=dict)
    losses: Losses = field(default_factory=list)
    groups: dict[str, list[_Member]] = field(default_factory=dict)
    origins: dict[Target, tuple[Update, ...]] = field(default_factory=dict)

    def keep(self, target: Target, group: tuple[Update, ...]) -> None:
        self.changed[target] = (*self.changed.get(target, ()), *group)

    def lose(self, target: Target, group: tuple[Update, ...], why: str) -> None:
        self.losses.append((target, why))
        self.keep(target, group)

    def add(self, target: Target, group: tuple[Update, ...], source: str) -> None:
        """Translate one target: rename it, split its updates, or record them as parts of a fused weight.

        `gather` later joins the recorded parts.

        Args:
            target: the target to translate.
            group: the target's updates.
            source: the current naming of all targets; empty if the targets have several namings.
        """
        root, rest = rooted(target.path)
        if self.family.component == CONTROLNET and self.naming == "diffusers" and not root:
            return self.keep(replace(target, path=f"{CONTROLNET}.{rest}"), group)
        if not source and rest in self.family.names(self.naming):
            source = self.naming
        source = source or self.family.naming_of([rest])
        if source == self.naming:
            return self.keep(target, group)
        pieces = self.family.moves(rest, source, self.naming, ratio_of(target, group))
        root = self._root(root)
        if not pieces:
            words = {"native": "its authors'", "comfyui": "ComfyUI's", "diffusers": "diffusers'"}.get(
                self.naming, f"the {self.naming}"
            )
            return self.lose(target, group, f"{words} name of this module of {self.family.title} is unknown")
        first = pieces[0]
        if len(pieces) == 1 and first.here.whole and first.there.whole:
            return self.keep(replace(target, path=root + first.path), group)
        if _is_order(pieces):
            turned = [reordered(update, pieces) for update in group]
            if None in turned or target.rows is not None:
                return self.lose(
                    target, group, "the other naming reorders the weight's rows, and the update cannot be reordered"
                )
            return self.keep(replace(target, path=root + first.path), tuple(u for u in turned if u is not None))
        return self._part(target, group, pieces, root, source)

    def _root(self, root: str) -> str:
        """Return the prefix of the translated path.

        If the new naming is diffusers', return the component's name and a dot. The prefix `transformer_2.` and an empty
        prefix stay unchanged. In any other naming, all prefixes stay unchanged.
        """
        if self.naming != "diffusers" or root in ("", "transformer_2."):
            return root
        return f"{self.family.component}."

    def _fused(self, target: Target, group: tuple[Update, ...], source: str) -> str | None:
        """Return the path of the fused module that diffusers creates for a LoKr; None if there is no such module.

        diffusers cannot load a LoKr that was split into parts.
        """
        if (
            not self.fuse
            or self.naming != "diffusers"
            or target.rows is not None
            or not all(isinstance(u, LoKr) for u in group)
        ):
            return None
        rest = rooted(target.path)[1]
        pieces = self.family.moves(rest, source, FUSED) if FUSED in self.family.namings else ()
        return pieces[0].path if len(pieces) == 1 and pieces[0].here.whole and pieces[0].there.whole else None

    def _part(
        self, target: Target, group: tuple[Update, ...], pieces: tuple[Piece, ...], root: str, source: str
    ) -> None:
        if target.rows is not None and all(isinstance(update, OFT) for update in group):
            exact = next((each for each in pieces if _is(target.rows, each.here) and each.there.whole), None)
            if exact is not None:
                return self.keep(replace(target, path=root + exact.path, rows=None), group)
        fused = self._fused(target, group, source)
        if fused is not None:
            return self.keep(replace(target, path=root + fused), group)
        parts: list[tuple[Piece, Update]] = []
        for update in group:
            if len(pieces) == 1 and pieces[0].here.whole:
                parts.append((pieces[0], update))
                continue
            if target.rows is None and outputs_of(update) is None and update.cuts("out"):
                # This update changes only the weight's inputs, so it is the same for all rows. Every part gets it.
                parts += [(piece, update) for piece in pieces]
                continue
            spans = _spans(target, update, pieces)
            inside = [(span, piece) for span, piece in zip(spans, pieces, strict=True) if span is not None]
            cut = parted(update, [span for span, _ in inside]) if inside else None
            if cut is None and inside and self.for_base and isinstance(update, LoKr) and not update.stacked:
                cut = [_difference(update, span) for span, _ in inside]
            if cut is None:
                return self.lose(
                    target, group, f"{update.method} on a fused weight cannot be split into the weight's parts"
                )
            parts += [(piece, part) for (_, piece), part in zip(inside, cut, strict=True)]
        self.origins[target] = group
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
            elif why and self.for_base and (unit := _unit(members)):
                for member in members:
                    rows = (member.run.start * unit, member.run.stop * unit)
                    self.keep(replace(member.origin, path=path, rows=rows), (member.update,))
            elif why:
                for target in dict.fromkeys(member.origin for member in members):
                    self.lose(target, self.origins[target], why)

    def _joined(self, path: str, members: list[_Member]) -> tuple[Update | None, str]:
        parts = [FusedPart(member.run, member.update) for member in members]
        if len({(member.run.start, member.run.stop) for member in members}) < len(members):
            return None, "a part of a fused weight has several updates"
        if all(isinstance(part.update, OFT) and part.unit for part in parts):
            # Do not join the rotations of the parts: each rotation affects only the rows of its part, and kohya's
            # format can store several rotations of one weight.
            for member, part in zip(members, parts, strict=True):
                rows = (part.run.start * part.unit, part.run.stop * part.unit)
                self.keep(replace(member.origin, path=path, rows=rows), (member.update,))
            return None, ""
        return joined(parts, fold=self.fold)


def _unit(members: Sequence[_Member]) -> int:
    """Return the number of rows in one of a fused weight's equal parts; 0 if the updates do not agree on a number.

    Updates that change only a weight's inputs do not show the number.
    """
    sized = [FusedPart(member.run, member.update) for member in members if outputs_of(member.update) is not None]
    units = {part.unit for part in sized}
    return units.pop() if len(units) == 1 else 0


def ratio_of(target: Target, group: tuple[Update, ...]) -> float | None:
    """Return the adapted weight's number of outputs divided by its number of inputs; None if either is unknown."""
    for update in group:
        dims = update.dims(target.stacked)
        out, in_ = outputs_of(update), dims.get("in", dims.get("columns"))
        if out and isinstance(in_, int) and in_ and target.rows is None:
            return out / in_
    return None


def _is_order(pieces: tuple[Piece, ...]) -> bool:
    """Whether the other naming stores the pieces as one whole module, with the rows in another order."""
    first = pieces[0]
    whole = len({piece.path for piece in pieces}) == 1 and sum(p.there.parts for p in pieces) == first.there.of
    return whole and len(pieces) > 1


def _is(rows: tuple[int, int] | None, run: Run) -> bool:
    """Whether `rows` can be exactly the rows of `run`. The fused weight's size is unknown, so any size is allowed."""
    size = 0 if rows is None else rows[1] - rows[0]
    return rows is not None and size % run.parts == 0 and rows[0] == run.start * (size // run.parts)


def _spans(target: Target, update: Update, pieces: tuple[Piece, ...]) -> list[tuple[int, int] | None]:
    """Return the rows of each piece, relative to the update's first row; None for pieces outside the update.

    All entries are None if the pieces do not cover exactly the update's rows, or if the sizes are unknown.
    """
    dims = update.dims()
    out, in_ = outputs_of(update), dims.get("in")
    of = pieces[0].here.of
    # An update of some rows does not show the weight's number of rows. So assume that each of the weight's equal parts
    # has as many rows as the weight has inputs.
    start, full = (0, out) if target.rows is None else (target.rows[0], of * in_ if isinstance(in_, int) else None)
    if not isinstance(full, int) or not isinstance(out, int) or full % of:
        return [None for _ in pieces]
    unit = full // of
    spans = [(piece.here.start * unit - start, piece.here.stop * unit - start) for piece in pieces]
    kept = [span if span[0] >= 0 and span[1] <= out else None for span in spans]
    return kept if sum(span[1] - span[0] for span in kept if span) == out else [None for _ in pieces]


def reordered(update: Update, pieces: tuple[Piece, ...]) -> Update | None:
    """Return the update with its parts in another order. All parts have the same number of rows.

    Return None if the update cannot be split or joined again.
    """
    out, of = outputs_of(update), pieces[0].here.of
    if out is None or out % of:
        return None
    unit = out // of
    parts = parted(update, [(piece.here.start * unit, piece.here.stop * unit) for piece in pieces])
    if parts is None:
        return None
    return joined([FusedPart(piece.there, part) for piece, part in zip(pieces, parts, strict=True)], fold=False)[0]


# Split updates of fused weights into updates of the parts, and join updates of parts.
#
# Rows are copied, and rows without an update get zeros. Values are computed only to fold different scalings.


def parted(update: Update, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Return one update for each span of rows; None if the update cannot be split along outputs.

    If a LoRA was joined from separate LoRAs of the spans, each span uses different rows of A, and the span's update
    gets only these rows. Otherwise, the update of each span gets the whole A.
    """
    if isinstance(update, LoRA) and (ranks := _diagonal(update, spans)):
        whole = [
            update.replace(A=narrow(update.A, 0, *rank), B=narrow(narrow(update.B, 0, *span), 1, *rank))
            for span, rank in zip(spans, ranks, strict=True)
        ]
        return [_bias_cut(part, span) for part, span in zip(whole, spans, strict=True)]
    if isinstance(update, LoKr):
        return _kronecker_parts(update, spans)
    if isinstance(update, OFT) and update.side == "out":
        return _rotation_parts(update, spans)
    if not update.cuts("out"):
        return None
    return [_rows(update, span) for span in spans]


def _rotation_parts(update: OFT, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Return one OFT for each span; None if the OFT does not store square blocks, or if it has a constraint.

    Also return None if a span starts or ends inside a block. A constraint applies to all blocks together.
    """
    name = "square" if update.square is not None else "pairs"
    size = int(update.dims()["b"]) if update.square is not None else 0  # type: ignore[arg-type]
    if not size or update.constraint or update.coft or any(edge % size for span in spans for edge in span):
        return None
    parts: list[Update] = []
    for start, stop in spans:
        part = update.replace(**{name: narrow(update.tensors[name], 0, start // size, stop // size)})
        parts.append(part if part.rescale is None else part.replace(rescale=narrow(part.rescale, 0, start, stop)))
    return parts


def _kronecker_parts(update: LoKr, spans: Sequence[tuple[int, int]]) -> list[Update] | None:
    """Return one LoKr for each span; None if a span starts or ends inside the rows that one row of w1 produces.

    Also return None if w2 is a stack of matrices.
    """
    size = int(update.dims()["out"]) // int(update.dims()["a"])  # type: ignore[arg-type]
    if update.stacked or any(edge % size for span in spans for edge in span):
        return None
    name = "w1" if update.w1 is not None else "w1_a"
    return [
        update.replace(**{name: narrow(update.tensors[name], 0, start // size, stop // size)}) for start, stop in spans
    ]


def _difference(update: LoKr, span: tuple[int, int]) -> Dense:
    """Return the change of a span of rows. The rows of a Kronecker product need not be a Kronecker product."""
    dims = update.dims()
    columns = dims.get("columns", dims.get("in"))

    def fetch() -> bytes:
        import numpy as np

        values = {name: as_array(as_lazy(leaf)).astype(np.float64) for name, leaf in update.tensors.items()}
        rows: bytes = np.asarray(update.replace(**values).block("out", *span).tensors["D"]).astype("<f4").tobytes()
        return rows

    return Dense(D=cast(Any, Lazy((span[1] - span[0], cast(int, columns)), DTYPES["F32"], fetch)), d=None)


def _rows(update: Update, span: tuple[int, int]) -> Update:
    changes = {}
    for name, leaf in update.tensors.items():
        axis = update.tensor_fields()[name].metadata["axes"].index("out")
        if axis is not None:
            changes[name] = narrow(leaf, axis, *span)
    return update.replace(**changes)


def _bias_cut(update: LoRA, span: tuple[int, int]) -> LoRA:
    return update if update.bias is None else update.replace(bias=narrow(update.bias, 0, *span))


def _diagonal(update: LoRA, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the range of B's columns that each span uses.

    Return an empty list if B is not block-diagonal, if a block is zero, or if there is only one span.
    """
    used = as_array(as_lazy(update.B)) != 0
    edges = [0]
    for start, stop in spans:
        columns = used[start:stop].any(0).nonzero()[0]
        if not len(columns) or columns[0] < edges[-1]:
            return []
        edges.append(int(columns[-1]) + 1)
    edges[-1] = used.shape[1]
    return list(pairwise(edges)) if len(spans) > 1 else []


def outputs_of(update: Update) -> int | None:
    """Return the number of outputs of an update's weight; None if the update's tensors do not show this number."""
    dims = update.dims()
    if isinstance(update, OFT) and update.side == "out" and update.square is not None:
        return int(dims["n"]) * int(dims["b"])  # type: ignore[arg-type]
    return cast("int | None", dims.get("out"))


def narrow(leaf: Leaf, axis: int, start: int, stop: int) -> Lazy:
    """Return the slice `start:stop` of an axis."""
    tensor = as_lazy(leaf)
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return tensor.map(lambda array: array[(*[slice(None)] * axis, slice(start, stop))], shape)


@dataclass(frozen=True, slots=True, eq=False)
class FusedPart:
    """An update of consecutive rows (`run`) of a fused weight."""

    run: Run
    update: Update

    @property
    def unit(self) -> int:
        """Return the number of rows in one of the weight's equal parts; 0 if the update does not show this number."""
        out = outputs_of(self.update) or 0
        return out // self.run.parts if out % self.run.parts == 0 else 0


def joined(parts: Sequence[FusedPart], *, fold: bool) -> tuple[Update | None, str]:
    """Join updates of parts of a fused weight into one update of the whole weight.

    Return (update, ""), or (None, reason) if the updates cannot be joined.

    Args:
        parts: the updates, each with its rows.
        fold: whether B may be multiplied by the ratio of two parts' scalings, which rounds B. If the ratio is a power
            of two from 2**-8 to 2**8, B is multiplied even if `fold` is false.
    """
    unit, of = parts[0].unit, parts[0].run.of
    if not unit and outputs_of(parts[0].update) is None and sum(part.run.parts for part in parts) == of:
        whole = _stacked([part.update for part in parts])
        return (
            whole,
            "" if whole is not None else f"{parts[0].update.method} differs between the parts of a fused weight",
        )
    if not unit or any(part.unit != unit for part in parts):
        return None, "the updates' numbers of outputs do not fit the parts of the fused weight"
    parts = sorted(parts, key=lambda part: part.run.start)
    rows = [(part.run.start * unit, part.run.stop * unit) for part in parts]
    updates: list[Any] = [part.update for part in parts]
    if all(isinstance(update, Dense) and update.scaling == 1 for update in updates):
        return _dense(updates, rows, unit * of), ""
    shared = _shared(updates)
    if all(isinstance(update, DoRA) for update in updates):
        if not shared or sum(part.run.parts for part in parts) != of:
            return None, "dora does not have the same A on all parts of a fused weight"
        lengths = place([(row, None, u.magnitude) for row, u in zip(rows, updates, strict=True)], (unit * of,))
        return updates[0].replace(B=_under(updates, rows, unit * of), magnitude=lengths), ""
    if shared and all(isinstance(update, LoRA) and update.bias is not None for update in updates):
        if sum(part.run.parts for part in parts) != of:
            return None, "lora has a bias on only some parts of a fused weight"
        bias = place([(row, None, u.bias) for row, u in zip(rows, updates, strict=True)], (unit * of,))
        return updates[0].replace(B=_under(updates, rows, unit * of), bias=bias), ""
    if not all(isinstance(update, LoRA) and update.bias is None for update in updates):
        if sum(part.run.parts for part in parts) == of and (whole := _stacked(updates)) is not None:
            return whole, ""
        return None, f"{updates[0].method} on parts of a fused weight cannot be joined into one update of that weight"
    if shared:
        return updates[0].replace(B=_under(updates, rows, unit * of)), ""
    return _block_diagonal(updates, rows, unit * of, fold)


def _stacked(updates: Sequence[Update]) -> Update | None:
    """Join updates by concatenating their tensors along the output axis, which must be the first axis.

    Tensors without an output axis must be equal in all updates. Return None if the updates cannot be joined.
    """
    first = updates[0]
    if any(type(u) is not type(first) or u.attributes != first.attributes for u in updates):
        return None
    if any(u.tensors.keys() != first.tensors.keys() for u in updates):
        return None
    rows = _with_rows(first)
    if not rows:
        # An update that changes only a weight's inputs is the same for all rows. So if the updates of all parts are
        # equal, the first of them is also the update of the whole weight.
        return first if first.cuts("out") and _alike(updates, first.tensors) else None
    if not _alike(updates, [name for name in first.tensors if name not in rows]):
        return None
    changes = {}
    for name, axis in rows.items():
        leaves = [as_lazy(u.tensors[name]) for u in updates]
        sizes = [leaf.shape[axis] for leaf in leaves]
        edges = [0, *accumulate(sizes)]
        shape = (*leaves[0].shape[:axis], edges[-1], *leaves[0].shape[axis + 1 :])
        if axis:
            return None
        changes[name] = place([(edge, None, leaf) for edge, leaf in zip(pairwise(edges), leaves, strict=True)], shape)
    return first.replace(**changes)


def _with_rows(update: Update) -> dict[str, int]:
    """Return a map from field to the axis along which outputs are joined; empty if the outputs cannot be joined."""
    if isinstance(update, LoKr):
        return {"w1" if update.w1 is not None else "w1_a": 0} if not update.stacked else {}
    if isinstance(update, OFT) and update.side == "out":
        name = "square" if update.square is not None else "pairs"
        free = not update.constraint and not update.coft
        return {name: 0, **({"rescale": 0} if update.rescale is not None else {})} if free else {}
    if not update.cuts("out"):
        return {}
    axes = {name: update.tensor_fields()[name].metadata["axes"].index("out") for name in update.tensors}
    return {name: axis for name, axis in axes.items() if axis is not None}


def _alike(updates: Sequence[Update], names: Iterable[str]) -> bool:
    """Whether the named tensors are equal in all updates."""
    return all(len({fingerprint(u.tensors[name]) for u in updates}) == 1 for name in names)


def _under(updates: Sequence[LoRA | DoRA], rows: Sequence[tuple[int, int]], out: int) -> Lazy:
    """Return B of the fused weight: each update's B at its `rows`, and zeros in the other rows."""
    rank = int(updates[0].B.shape[1])
    return place([(row, (0, rank), u.B) for row, u in zip(rows, updates, strict=True)], (out, rank))


def _dense(updates: Sequence[Dense], rows: Sequence[tuple[int, int]], out: int) -> Dense:
    changes: dict[str, Lazy] = {}
    for name in ("D", "d"):
        leaves = [(row, u.tensors[name]) for row, u in zip(rows, updates, strict=True) if name in u.tensors]
        if leaves:
            rest = tuple(leaves[0][1].shape[1:])
            changes[name] = place([(row, None, leaf) for row, leaf in leaves], (out, *rest))
    return Dense(**cast(Any, changes))


def _block_diagonal(
    updates: Sequence[LoRA], rows: Sequence[tuple[int, int]], out: int, fold: bool
) -> tuple[Update | None, str]:
    scaling, blocks = next((u.scaling for u in updates if u.scaling), 0.0), []
    for update in updates:
        ratio = update.scaling / scaling if scaling else 0.0
        if not fold and not _power_of_two(ratio):
            return None, "the parts of a fused weight have different scalings"
        blocks.append(update.B if ratio == 1 else times(update.B, ratio))
    # If several parts have the same A, store this A only once. Example: a weight fuses queries, keys, values and an
    # MLP. The queries, keys and values share one A, and the MLP has another A.
    ranks, blocks_by_A, end = list[tuple[int, int]](), dict[str, tuple[int, int]](), 0
    for update in updates:
        known = blocks_by_A.setdefault(fingerprint(update.A), (end, end + int(update.A.shape[0])))
        ranks.append(known)
        end = max(end, known[1])
    tail = tuple(updates[0].A.shape[1:])
    A = place([(rank, None, u.A) for rank, u in zip(ranks, updates, strict=True)], (end, *tail))
    B = place([(row, rank, b) for row, rank, b in zip(rows, ranks, blocks, strict=True)], (out, end))
    return LoRA(A=cast(Any, A), B=cast(Any, B), bias=None, scaling=scaling), ""


def _power_of_two(ratio: float) -> bool:
    return ratio > 0 and math.frexp(ratio)[0] == 0.5 and 2.0**-8 <= ratio <= 2.0**8


def _shared(updates: Sequence[Update]) -> bool:
    """Whether all updates have the same A and the same scaling."""
    pairs = [update for update in updates if isinstance(update, LoRA | DoRA)]
    if len(pairs) < len(updates) or len({pair.scaling for pair in pairs}) > 1:
        return False
    if all(pair.A is pairs[0].A for pair in pairs):
        return True
    return len({fingerprint(pair.A) for pair in pairs}) == 1


Place = tuple[tuple[int, int], tuple[int, int] | None, Any]


def place(parts: Iterable[Place], shape: tuple[int, ...]) -> Lazy:
    """Copy tensors into a tensor of zeros. The result has the tensors' dtype, or float32 if the dtypes differ.

    Each part is (rows, columns, tensor). If `columns` is None, the tensor covers all columns.
    """
    kept = [(rows, columns, as_lazy(leaf)) for rows, columns, leaf in parts]
    kinds = {leaf.dtype.name for _, _, leaf in kept}
    dtype = kept[0][2].dtype if len(kinds) == 1 else DTYPES["F32"]

    def fetch() -> bytes:
        import numpy as np

        whole = np.zeros(shape, dtype.numpy)
        for rows, columns, leaf in kept:
            there = (slice(*rows),) if columns is None else (slice(*rows), slice(*columns))
            whole[there] = leaf.numpy() if len(kinds) == 1 else as_array(leaf).astype("<f4")
        return whole.tobytes()

    return Lazy(shape, dtype, fetch)


# Translate targets of image models to one naming, so that adapters from several tools can be compared and combined.


def in_components(updates: Updates) -> dict[Target, tuple[Update, ...]]:
    """Set the prefix of each target to diffusers' name for the target's component. Any old prefix is replaced.

    Example: `x_embedder` becomes `transformer.x_embedder`. Targets of unknown components stay unchanged.
    """
    renamed: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        component = component_of(module_of(target.path))
        place = target if component is None else replace(target, path=f"{component}.{rooted(target.path)[1]}")
        renamed[place] = (*renamed.get(place, ()), *each)
    return renamed


def in_parts(
    updates: Updates, families: tuple[str, ...] = (), *, fuse: bool = True
) -> dict[Target, tuple[Update, ...]]:
    """Translate targets to diffusers' naming with the component as prefix, and split updates of fused weights.

    Args:
        updates: the updates.
        families: the names of the possible families; if empty, the targets' names decide.
        fuse: whether a LoKr of a fused weight stays one update; see `in_naming`.
    """
    return in_diffusers(in_components(updates), (), Origin(families=families), fuse=fuse)[0]


def parts_of(path: str) -> list[str]:
    """Return diffusers' names for the native name `path`: several for a fused weight, none for an unknown module."""
    root, rest = rooted(path)
    component = component_of(path)
    before = f"{component}." if root and component else ""
    pieces = (piece for family in families_of(rest, "native") for piece in family.moves(rest, "native", "diffusers"))
    return list(dict.fromkeys(before + piece.path for piece in pieces))


def in_one_naming(adapters: Sequence[Updates]) -> list[Updates]:
    """Translate the targets of several adapters to one naming, with the same prefix for each component.

    All adapters stay unchanged if they already have the same naming and prefix, if no family has the modules of all
    adapters, or if fewer than two of the adapters change a U-Net or transformer.

    Raises:
        UsageError: the adapters are for different families of image models.
    """
    paths = [[target.path for target in denoiser_targets(updates, ())] for updates in adapters]
    every = [path for each in paths for path in each]
    if sum(map(bool, paths)) < 2:
        return list(adapters)
    _check_families(paths)
    names = [rooted(path)[1] for path in every]
    families = families_of_all(every)
    roots = {rooted(path)[0] for path in every}
    same = any(_family(family).naming_of(names) for family in families)
    if not families or (same and len(roots) == 1):
        return list(adapters)
    return [in_components(updates) if same else in_parts(updates, families) for updates in adapters]


def _check_families(adapters: Sequence[Sequence[str]]) -> None:
    """Check that every adapter has a possible family in common with the first adapter.

    Raises:
        UsageError: an adapter and the first adapter have no family in common; the error names the families of both.
    """
    known = [(paths[0], frozenset(families_of_all(paths))) for paths in adapters if paths]
    for place, others in known[1:]:
        first = known[0][1]
        if not _same_naming(first, others):
            names = [_titles(each) or "an unknown family" for each in (first, others)]
            why = f"the adapters are for different models: {names[0]}, and {names[1]}"
            raise UsageError(
                why, where=place, cure="Pass only adapters for the same base: these adapters have no weight in common"
            )


def _same_naming(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets of families have a common family, or are both empty.

    If each of the sets contains a family that is not generic, the generic families in both sets are ignored.
    """
    if not one or not other:
        return one == other
    special = [specific(names) for names in (one, other)]
    return bool(special[0] & special[1] if all(special) else one & other)


def specific(families: Collection[str]) -> frozenset[str]:
    """Return the families that are not generic."""
    return frozenset(name for name in families if not _family(name).facts.generic)


def _titles(families: frozenset[str]) -> str:
    return " or ".join(sorted(_family(name).title for name in specific(families) or families))


def _family(name: str) -> ImageFamily:
    return next(each for each in all_families() if each.name == name)
