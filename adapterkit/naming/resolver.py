"""Map the names of an adapter to those of a base, proven by names and shapes, never guessed.

For each target it tries, in this order: a rule of the user; the exact name; the name without words that wrappers such
as FSDP insert; the architecture of the base's family; a change of prefixes that gives every target a place. Two
readings that both fit are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..errors import TargetNotFound
from .architectures import QKV, Architecture, Place, fill, is_family, shape_of
from .renames import Rename, renamed_by
from .tables import without_prefix

Fits = Callable[[str, str], bool]
"""(name in the adapter, name in the base) -> whether the shapes fit each other."""

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Words that torch.compile, FSDP, activation checkpointing and Fabric insert into paths; no model has them itself."""

PERHAPS = frozenset({"module", "default"})
"""Words of DistributedDataParallel and of adapters' names that a model may also have itself."""


class PathPart(NamedTuple):
    """The rows of a fused weight that belong to one of its parts.

    Attributes:
        number: the number of the part, from 0.
        of: how many equal parts there are.
        interleaved: the part has every `of`-th row from row `number` on; otherwise it is one run of rows.
        heads: the parts are all queries, all keys and all values, with unequal sizes that follow from the base's heads.
        groups: only with `heads`: rows stand group by group: the queries that share a key, the key, the value.
    """

    number: int
    of: int
    interleaved: bool = False
    heads: bool = False
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """The place of one part of a target in the base.

    Attributes:
        path: the name in the base.
        take: the part of the target's rows that goes there; None for all.
        into: the part of the rows there that it becomes; None for all.
        expert: the slice of a target that is a stack; None for all of it.
        slot: the slice of a stack in the base; None for all of it.
        turn: places, without their names, with the order of the rows in the adapter and in the base; None if both are
            the same.
    """

    path: str
    take: PathPart | None = None
    into: PathPart | None = None
    expert: int | None = None
    slot: int | None = None
    turn: tuple[Place, Place] | None = None

    @property
    def plain(self) -> bool:
        """Whether the move only changes the name."""
        return (self.take, self.into, self.expert, self.slot, self.turn) == (None, None, None, None, None)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that was used.

    Attributes:
        kind: `user`, `exact`, `wrapper`, `architecture` or `prefix`.
        text: the rule in words; empty for `exact`.
        targets: how many targets it placed.
    """

    kind: str
    text: str
    targets: int

    def __str__(self) -> str:
        return f"{self.kind} {self.text}".strip()


@dataclass(slots=True)
class Resolution:
    """The map from an adapter to a base.

    Attributes:
        moves: name in the adapter -> the places of its parts.
        missing: names without a place.
        rules: the rules that were used, in the order in which they were tried.
        prefixes: the changes of prefixes among them, as (removed, added).
    """

    moves: dict[str, tuple[Move, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    prefixes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Names:
    """The names of a base.

    Attributes:
        paths: dotted paths of its modules with a weight or a bias, and of its parameters.
        outer: paths of all modules, for the targets in `anywhere`.
        anywhere: targets that may be any module.
        shapes: the templates of `paths`, each with one path as an example.
        known: family -> the names that its file gives for this base; computed when first needed.
        experts: how many experts a layer has by the base's config; 0 where it does not say.
    """

    paths: Collection[str]
    outer: Collection[str] = ()
    anywhere: Collection[str] = ()
    shapes: dict[str, str] = field(default_factory=dict)
    known: dict[str, _Known] = field(default_factory=dict)
    experts: int = 0

    def has(self, path: str, target: str) -> bool:
        """Whether a target may be at a path."""
        return path in (self.outer if target in self.anywhere else self.paths)

    def lacks_weight(self, path: str) -> bool:
        """Whether a base has the bias of a module and no weight beside it."""
        return f"{path}.bias" in self.paths and f"{path}.weight" not in self.paths

    @cached_property
    def without_wrappers(self) -> tuple[Names, dict[str, str]] | None:
        """Return the names without wrappers' words, and short name -> full name; None if no name has such a word.

        A state dict that was saved inside FSDP or torch.compile has such words, and one of PEFT's models `base_layer`.
        """
        off = WRAPPERS | {"base_layer"}
        # One search per word in one string: a search per name takes 40 times as long for the 90,000 names of a large
        # mixture of experts.
        text = "\n".join(self.paths)
        if not any(word in text for word in off):
            return None
        wrapped = [path for path in self.paths if any(word in path for word in off)]
        words = {path: [word for word in path.split(".") if word not in off] for path in wrapped}
        real = {".".join(left): path for path, left in words.items() if len(left) <= path.count(".")}
        real = {name: path for name, path in real.items() if name and name not in self.paths}
        if not real:
            return None
        taken = set(real.values())
        paths = {path for path in self.paths if path not in taken} | real.keys()
        return Names(paths, self.outer, self.anywhere, experts=self.experts), real


def resolve(
    targets: Sequence[str],
    base: Names,
    *,
    architecture: Architecture | None = None,
    renames: Sequence[Rename] = (),
    partial: bool = False,
    fits: Fits = lambda *_: True,
) -> Resolution:
    """Map an adapter's names to a base's.

    Args:
        targets: the names in the adapter.
        base: the names in the base.
        architecture: the architecture of the base's family, if there is a file for it.
        renames: the user's rules; the first that matches a name is used.
        partial: allow targets without a place.
        fits: whether the shapes of a target and of a place fit; called if names alone leave more than one reading.

    Returns:
        the moves of all targets that have a place.

    Raises:
        TargetNotFound: two readings of a target's name fit.
    """
    inside = base.without_wrappers
    if inside is not None:
        names, real = inside
        bare = {path: name for name, path in real.items()}
        ours = {bare.get(target, target): target for target in targets}
        found = resolve(
            list(ours), names, architecture=architecture, renames=renames, partial=partial,
            fits=lambda target, path: fits(ours[target], real.get(path, path)),
        )  # fmt: skip
        count = sum(any(move.path in real for move in moves) for moves in found.moves.values())
        found.moves = {
            ours[target]: tuple(replace(move, path=real.get(move.path, move.path)) for move in moves)
            for target, moves in found.moves.items()
        }
        found.missing = [ours[target] for target in found.missing]
        found.rules.append(Rule("wrapper", "in the base", count))
        return found
    resolution = Resolution()
    left = _by_renames(targets, base, renames, resolution)
    halves: Left = []
    if architecture is not None:
        # Jev's files have the bias of its head as `proj.bias`, and its weight as `weight`.
        halves = [each for each in left if base.lacks_weight(each[1]) and each[0] not in base.anywhere]
        left = [each for each in left if each not in halves] if halves else left
    left = _exact(left, base, resolution)
    left = _unwrapped(left, base, resolution)
    left = _of_modules(left)
    if left and architecture is not None:
        left = _by_architecture(left, base, architecture, resolution)
    if halves and architecture is not None:
        left += _exact(_by_architecture(halves, base, architecture, resolution), base, resolution)
    if left:
        family = None if architecture is None else base.known.get(architecture.family)
        left = _by_prefixes(left, base, resolution, partial, fits, family)
    resolution.missing = [target for target, _ in left]
    return resolution


Left = list[tuple[str, str]]
"""(target, its name so far) of targets still without a place."""


def _by_renames(targets: Sequence[str], base: Names, renames: Sequence[Rename], resolution: Resolution) -> Left:
    if not renames:
        return [(target, target) for target in targets]
    left, counts = list[tuple[str, str]](), dict[str, int]()
    for target in targets:
        name, rule = renamed_by(target, renames)
        if rule is not None:
            counts[rule.text] = counts.get(rule.text, 0) + 1
        if name != target and base.has(name, target):
            resolution.moves[target] = (Move(name),)
        else:
            left.append((target, name))
    resolution.rules += [Rule("user", text, count) for text, count in counts.items()]
    return left


def _exact(left: Left, base: Names, resolution: Resolution) -> Left:
    rest = []
    for target, name in left:
        if base.has(name, target):
            resolution.moves[target] = (Move(name),)
        else:
            rest.append((target, name))
    if len(rest) < len(left):
        resolution.rules.append(Rule("exact", "", len(left) - len(rest)))
    return rest


def _unwrapped(left: Left, base: Names, resolution: Resolution) -> Left:
    """Remove wrappers' words; targets that then have a place are placed, and the others go on without those words."""
    perhaps = WRAPPERS | PERHAPS
    if not any(word in name for _, name in left for word in perhaps):
        return left
    known = {word for shape in _shapes(base) for word in shape.split(".")}
    off = WRAPPERS | (PERHAPS - known)
    rest, seen, placed = list[tuple[str, str]](), set[str](), 0
    for target, name in left:
        words = name.split(".")
        if not off.isdisjoint(words):
            seen |= off.intersection(words)
            name = ".".join(word for word in words if word not in off)
            if base.has(name, target):
                resolution.moves[target] = (Move(name),)
                placed += 1
                continue
        rest.append((target, name))
    if seen:
        resolution.rules.append(Rule("wrapper", " ".join(f"{word}." for word in sorted(seen)), placed))
    return rest


def _of_modules(left: Left) -> Left:
    """Name targets that are the weight of a module by the module, as the other rules and the families' files do.

    PEFT's `target_parameters=["mlp.gate.weight"]` is the weight of a router, which Mixtral's files keep in
    `block_sparse_moe.gate`.
    """
    return [(target, name.removesuffix(".weight")) for target, name in left]


def _by_architecture(left: Left, base: Names, architecture: Architecture, resolution: Resolution) -> Left:
    known = base.known.get(architecture.family)
    if known is None or known.architecture is not architecture:
        known = base.known[architecture.family] = _Known(base, architecture)
    rest, counts = list[tuple[str, str]](), dict[tuple[str, str], int]()
    placed: list[tuple[str, str, tuple[Move, ...], tuple[str, str]]] = []
    for target, name in left:
        readings = known.readings(name)
        if len(readings) > 1:
            raise _ambiguous(target, [moves[0].path for moves in readings])
        if readings:
            placed.append((target, name, *next(iter(readings.items()))))
        else:
            rest.append((target, name))
    # FLAVA has three encoders of the names that DPT has once. A prefix that is left out must not make two targets one.
    uses = Counter(_spot(move) for moves in resolution.moves.values() for move in moves)
    uses.update(_spot(move) for _, _, moves, _ in placed for move in moves)
    for target, name, moves, used in placed:
        if any(uses[_spot(move)] > 1 for move in moves):
            rest.append((target, name))
            continue
        resolution.moves[target] = moves
        counts[used] = counts.get(used, 0) + 1
    for (ours, theirs), count in counts.items():
        text = f"{architecture.family}: {ours} -> {theirs}"
        resolution.rules.append(Rule("architecture", text, count))
    return rest


def _spot(move: Move) -> tuple[str, PathPart | None, int | None]:
    """Return the part of the base that a move writes to: path, rows, slice of a stack."""
    return move.path, move.into, move.slot


class _Known:
    """The names that a family's file gives for a base, moved by the base's own prefix."""

    def __init__(self, base: Names, architecture: Architecture) -> None:
        self.base, self.architecture = base, architecture
        self.shapes = _shapes(base)
        self.counts: dict[str, int] = {}
        templates = {naming: list(architecture.templates(naming)) for naming in architecture.namings}
        covered = {naming: sum(t in self.shapes for t in known) for naming, known in templates.items()}
        # A base with the exact names of one naming needs no prefix; a search for one could only mislead. But a class
        # without a head may have another prefix in one part alone: Dots 3's text model beside its towers.
        plain = {naming for naming, count in covered.items() if 2 * count > len(templates[naming])}
        self.prefixes = {
            naming: self._prefix(known, bool(plain)) if not plain or naming in plain else ("", "")
            for naming, known in templates.items()
        }

    def readings(self, name: str) -> dict[tuple[Move, ...], tuple[str, str]]:
        """Return every distinct way to place a name, with the namings that it goes from and to."""
        found: dict[tuple[Move, ...], tuple[str, str]] = {}
        rooted = [f"{self.root}.{name}"] if self.root and not name.startswith(f"{self.root}.") else []
        # A base that is one part of a model lacks the prefix of that part, and so may an adapter of the same class.
        rooted += [off + name for off, on in dict.fromkeys(self.prefixes.values()) if off and not on]
        for own in (*variants(name), *rooted):
            if self.loses_a_part(name, own):
                continue
            for ours in self.architecture.namings_with(own):
                weights = self.architecture.find(own, ours)
                for theirs in self.architecture.namings if weights else ():
                    moves = self._moves(weights, theirs)
                    if moves is not None:
                        found.setdefault(moves, (ours, theirs))
            if found:
                break
        return found

    @cached_property
    def root(self) -> str:
        """Return the module that the class without a head is inside the others: `vit` of a ViT; empty for `model`.

        `AutoModel` gives that class, and an adapter of it has no such word: `layers.0.attention.q_proj`.
        """
        firsts = Counter(weight.partition(".")[0] for weight in self.architecture.record.weights)
        (word, count), *_ = firsts.most_common(1) or [("", 0)]
        return word if 2 * count > firsts.total() and is_family(word) else ""

    def loses_a_part(self, name: str, own: str) -> bool:
        """Whether a name lost, with its prefix, the one word that says which part of a model it is in.

        `model.vision_tower.blocks.0` of an ERNIE is not the `blocks.0` that Cosmos files have: that family calls the
        part `visual`.
        """
        if not name.endswith(own):
            return False
        off = [word for word in name[: -len(own)].split(".") if word and word not in self.words]
        roles, ours = _parts("role", ".".join(off)), _parts("role", self.architecture.family)
        if roles and ours and roles.isdisjoint(ours):
            return True
        lost = set[str]().union(*(_modalities(word) for word in off)) - {"text"} - _modalities(own)
        return bool(lost and (lost & self.modalities or self.text_alone))

    @cached_property
    def text_alone(self) -> bool:
        """Whether the family is a decoder of text: its file has a vocabulary and names no other part of a model.

        Gemma 3's text model has no vision tower, though the tower's layers have names that its own layers have, too.
        """
        return bool(self.architecture.record.vocabulary) and not self.modalities and "encoder" not in self.words

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Which of vision, text and audio the family's words mention."""
        return frozenset[str]().union(*(_modalities(word) for word in self.words))

    @cached_property
    def words(self) -> frozenset[str]:
        """Return the words of the family's names, in all namings."""
        every = (self.architecture.templates(naming) for naming in self.architecture.namings)
        return frozenset(word for templates in every for name in templates for word in name.split("."))

    def _prefix(self, templates: Sequence[str], in_part: bool = False) -> tuple[str, str]:
        """Find the prefix that the base removed from a naming, or added; a model saved without its head removes one.

        Args:
            templates: the names of the naming.
            in_part: the base has names of the family as they are; then a prefix must be one that no name of the base
                has, and all the names of the naming with this prefix must have a place without it.
        """
        best, most = ("", ""), sum(template in self.shapes for template in templates)
        trials = {(off, on) for template in templates for off, on in _ends(template, self.shapes) if "#" not in off}
        for off, on in sorted(trials):
            if in_part and not self._moves_a_part(templates, off, on):
                continue
            count = sum(_swap(template, off, on) in self.shapes for template in templates)
            if count > most:
                best, most = (off, on), count
        return best

    def _moves_a_part(self, templates: Sequence[str], off: str, on: str) -> bool:
        """Whether a whole part of a naming has its place in the base under another prefix, and none under its own."""
        part = [template for template in templates if template.startswith(off)]
        return bool(off) and all(
            template not in self.shapes and _swap(template, off, on) in self.shapes for template in part
        )

    def _moves(self, weights: Sequence[Found], naming: str) -> tuple[Move, ...] | None:
        moves = moves_to(
            self.architecture, weights, naming, lambda place, numbers: self._path(place, numbers, naming),
            lambda place, numbers: self._experts(place, numbers, naming),
        )  # fmt: skip
        if not moves or any(move.path not in self.base.paths for move in moves):
            return None
        return None if len(moves) == 1 and self.base.lacks_weight(moves[0].path) else moves

    def _path(self, place: Place, numbers: Mapping[str, str], naming: str) -> str:
        return _swap(fill(place.name, numbers), *self.prefixes[naming])

    def _experts(self, place: Place, numbers: Mapping[str, str], naming: str) -> int:
        """Return how many experts the weight has in the base; for a stack, the base's config tells it."""
        if place.stacked:
            return self.base.experts
        each = self._path(place, {**numbers, "{e}": "{e}"}, naming)
        if each not in self.counts:
            count = 0
            while each.replace("{e}", str(count)) in self.base.paths:
                count += 1
            self.counts[each] = count
        return self.counts[each] // (1 if place.half is None else 2)


Found = tuple[str, Place, dict[str, str]]
"""(key of a weight, its place in the naming of the name, numbers in the holes)."""


def moves_to(
    architecture: Architecture,
    weights: Sequence[Found],
    naming: str,
    path: Callable[[Place, Mapping[str, str]], str],
    experts: Callable[[Place, Mapping[str, str]], int],
    orders: bool = True,
) -> tuple[Move, ...] | None:
    """Find the places of one name's weights in another naming; None if that naming lacks one of them.

    Args:
        architecture: the family.
        weights: the result of `Architecture.find` for the name.
        naming: the other naming.
        path: returns a place's name with numbers in its holes.
        experts: returns how many experts the weight of a place has.
        orders: report rows that are in another order; False for a caller that handles orders itself.
    """
    moves: list[Move] = []
    for weight, ours, numbers in weights:
        theirs = architecture.place(weight, naming)
        if theirs is None or (orders and (ours.beside or theirs.beside)):
            return None  # Rows that are spread over two tensors are not a part of one.
        take, into = part_of(ours), part_of(theirs)
        before, after = (Place("", rows=place.rows, heads=place.heads) for place in (ours, theirs))
        turn = (before, after) if orders and before != after else None
        if ours.half is not None:
            # The number counts the experts of two weights that share the rows; it belongs to one of the two.
            count = experts(theirs, numbers)
            own = int(numbers["{e}"]) - ours.half * count
            if not 0 <= own < count:
                continue
            numbers = {**numbers, "{e}": str(own)}
        if ours.stacked and not theirs.stacked:
            count = experts(theirs, numbers)
            first = count * (theirs.half or 0)
            # The other holes are filled once for all experts: a large model has tens of thousands of them.
            each = path(theirs, {**numbers, "{e}": "{e}"})
            moves += [
                Move(each.replace("{e}", str(first + expert)), take, into, expert=expert, turn=turn)
                for expert in range(count)
            ]
        else:
            slot = int(numbers["{e}"]) if theirs.stacked and not ours.stacked else None
            moves.append(Move(path(theirs, numbers), take, into, slot=slot, turn=turn))
    return _joined(moves) if moves else None


def translate(name: str, architecture: Architecture, naming: str, experts: int) -> tuple[Move, ...] | None:
    """Find the place of a name in one of its family's namings, without a base; None if it has no place.

    Rows keep their order, because formats put rows into the order of their files themselves.

    Args:
        name: the name of a target.
        architecture: the family.
        naming: the naming to go to.
        experts: how many experts a stack of this name has.

    Raises:
        TargetNotFound: two readings of the name lead to different places.
    """
    found: dict[tuple[Move, ...], None] = {}
    for own in variants(name):
        for ours in architecture.namings_with(own):
            moves = moves_to(
                architecture, architecture.find(own, ours), naming, lambda place, numbers: fill(place.name, numbers),
                lambda *_: experts, orders=False,
            )  # fmt: skip
            if moves:
                found[moves] = None
        if found:
            break
    if len(found) > 1:
        raise _ambiguous(name, [moves[0].path for moves in found])
    return next(iter(found), None)


def part_of(place: Place) -> PathPart | None:
    """Return the part of a tensor that a place is; None if it is the whole tensor."""
    if place.qkv is not None:
        return PathPart(QKV.index(place.qkv), len(QKV), heads=True, groups=place.groups)
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def _joined(moves: list[Move]) -> tuple[Move, ...]:
    """Join moves of parts that are adjacent on both sides in one tensor."""
    first = moves[0]
    same = all((m.path, m.take, m.expert, m.slot) == (first.path, m.into, first.expert, first.slot) for m in moves)
    plain = all(move.turn is None for move in moves)
    if same and plain and first.take is not None and len(moves) == first.take.of:
        return (Move(first.path, expert=first.expert, slot=first.slot),)
    return tuple(moves)


def variants(name: str) -> Iterator[str]:
    """Yield a name, and its names under another head or none: without prefixes, then with `model.` added."""
    yield name
    words = name.split(".")
    for cut in range(1, min(len(words), 4)):
        if words[cut - 1].isdigit():
            break
        yield ".".join(words[cut:])
    yield f"model.{name}"
    # A language model inside a larger one. Any other word may name a vision tower, whose layers have the same names.
    yield from without_prefix(name)


def _by_prefixes(
    left: Left, base: Names, resolution: Resolution, partial: bool, fits: Fits, family: _Known | None
) -> Left:
    """Change prefixes: one rule for each prefix, and every target that has the prefix must find a place by it.

    If the base's `family` is known, its file lists the names of its parts. A word that only another family uses is then
    not the name of a part: `model.text_model.` of an Idefics is not the `language_model.model.` of a LLaVA.
    """
    templates = _trials(left, base)
    if family is not None:
        templates = {
            name: {p for p in pairs if _keeps_parts(*p) and not family.loses_a_part(name, _swap(name, *p))}
            for name, pairs in templates.items()
        }
    # The shortest prefix goes first: a longer common ending is better proof. `decoder.layers` is
    # `model.decoder.layers`, and not `model.encoder.layers`, although that would fit as well.
    prefixes = sorted(
        {off for trials in templates.values() for off, _ in trials}, key=lambda prefix: (prefix.count("."), prefix)
    )
    # A place that another target already has is excluded: an encoder's layers are not the decoder's.
    taken = {move.path for moves in resolution.moves.values() for move in moves}
    rest, found = left, True
    while rest and found:
        # A rule that places targets can free a shorter prefix for the others: `model.` after `model.text.` is done.
        found = False
        for off in prefixes:
            group = [(target, name) for target, name in rest if name.startswith(off)]
            on = _exchanged(group, off, templates, base, taken, fits) if group else None
            if on is not None:
                rest = _placed(group, rest, off, on, base, taken, resolution)
                found = True
                break
    if rest and partial:
        tried = _tried(rest, "", templates, base, taken)
        most = max(tried.values(), default=0)
        best = [on for on, count in tried.items() if count == most and most]
        if len(best) == 1:
            rest = _placed(rest, rest, "", best[0], base, taken, resolution)
    return rest


def _exchanged(
    group: Left,
    off: str,
    templates: Mapping[str, set[tuple[str, str]]],
    base: Names,
    taken: Collection[str],
    fits: Fits,
) -> str | None:
    """Find the prefix that replaces `off` and gives every target of a group a place; None if there is none.

    Raises:
        TargetNotFound: several prefixes do.
    """
    full = [on for on, count in _tried(group, off, templates, base, taken).items() if count == len(group)]
    if full:
        # A change of a shorter prefix may place the group as well. VibeVoice has two towers of one shape:
        # `model.acoustic.` is `acoustic.` by `model.` -> nothing, although `semantic.` has a place for every name, too.
        full += [
            on for on in _shorter(group, off, templates) if on not in full and _all_land(group, off, on, base, taken)
        ]
    if len(full) > 1:
        full = [on for on in full if all(fits(target, _swap(name, off, on)) for target, name in group)] or full
    if len(full) > 1:
        full = _keeping_words(off, full) or full
    if len(full) > 1:
        target, name = group[0]
        raise _ambiguous(target, [_swap(name, off, on) for on in full])
    return full[0] if full else None


def _shorter(group: Left, off: str, templates: Mapping[str, set[tuple[str, str]]]) -> list[str]:
    """List replacements of a prefix that change only its first words."""
    ours = sorted({_template(name) for _, name in group})
    changes = {(front, on) for template in ours for front, on in templates[template] if front and front != off}
    return sorted({on + off[len(front) :] for front, on in changes if off.startswith(front)})


def _all_land(group: Left, off: str, on: str, base: Names, taken: Collection[str]) -> bool:
    return all(_lands(target, name, off, on, base, taken) for target, name in group)


def _keeping_words(off: str, candidates: Sequence[str]) -> list[str]:
    """Return the candidate that only drops or adds words, if every other one loses a word of `off` that it keeps.

    Video-LLaVA has two towers of one shape: `image_tower.vision_model.` is `image_tower.`, and not `video_tower.`.
    """
    words = off.split(".")[:-1]
    kept = {on: [word for word in words if word in on.split(".")] for on in candidates}
    plain = [on for on in candidates if kept[on] in (words, on.split(".")[:-1])]
    if len(plain) != 1 or not set(kept[plain[0]]) - {"model", "transformer"}:
        return []
    others = (set(kept[on]) for on in candidates if on != plain[0])
    return plain if all(set(kept[plain[0]]) - other for other in others) else []


def _tried(
    group: Left, off: str, templates: Mapping[str, set[tuple[str, str]]], base: Names, taken: Collection[str]
) -> dict[str, int]:
    """Return each prefix to try in place of another -> how many targets of a group it places."""
    ours = sorted({_template(name) for _, name in group})
    tried = dict.fromkeys([on for template in ours for prefix, on in sorted(templates[template]) if prefix == off], 0)
    for on in tried:
        tried[on] = sum(_lands(target, name, off, on, base, taken) for target, name in group)
    return tried


def _placed(group: Left, rest: Left, off: str, on: str, base: Names, taken: set[str], resolution: Resolution) -> Left:
    """Place a group's targets by a change of prefixes; returns those of `rest` that are left."""
    placed = 0
    for target, name in group:
        if _lands(target, name, off, on, base, taken):
            resolution.moves[target] = (Move(_swap(name, off, on)),)
            placed += 1
    taken.update(resolution.moves[target][0].path for target, _ in group if target in resolution.moves)
    resolution.prefixes.append((off, on))
    resolution.rules.append(Rule("prefix", f"{off or '(none)'} -> {on or '(none)'}", placed))
    return [(target, name) for target, name in rest if target not in resolution.moves]


def _trials(left: Left, base: Names) -> dict[str, set[tuple[str, str]]]:
    """Return template -> the changes of prefixes to try; a number in a prefix must be the same in all names."""
    names: dict[str, list[str]] = {}
    for _, name in left:
        names.setdefault(_template(name), []).append(name)
    found: dict[str, set[tuple[str, str]]] = {}
    for template, several in names.items():
        found[template] = set()
        for off, on in _ends(template, _shapes(base)):
            words = off.count(".")
            fronts = {".".join(name.split(".", words)[:words]) + "." for name in several} if "#" in off else {off}
            if len(fronts) == 1:
                found[template].add((fronts.pop(), on))
    return found


def _lands(target: str, name: str, off: str, on: str, base: Names, taken: Collection[str]) -> bool:
    path = _swap(name, off, on)
    return path not in taken and base.has(path, target)


def _ends(template: str, shapes: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return the changes of prefixes that turn one template into another and keep their longest common ending.

    A prefix that is exchanged has no layer's number in it, and keeps the word before the first number: only the
    container of a model's layers is renamed, not the layers.
    """
    words = template.split(".")
    keep = max(words.index("#") - 1 if "#" in words else len(words) - 1, 0)
    found = set()
    for cut in range(len(words)):
        end = shape_of(".".join(words[cut:]))
        for shape in _ending(shapes).get(end, ()):
            on = "".join(f"{word}." for word in shape.split(".")[: shape.count(".") + 1 - (len(words) - cut)])
            off = "".join(f"{word}." for word in words[:cut])
            # The base may be a part of a model, such as one layer; it then has no word before its own names.
            whole = cut <= keep or not on
            if whole and "#" not in on and (not on or not off or exchangeable(off, on)):
                found.add((off, on))
    return found


@lru_cache(maxsize=1 << 10)
def exchangeable(off: str, on: str) -> bool:
    """Whether one prefix may stand for another: their last words differ, and they do not name two different things.

    `roberta.` is not `bert.` under another name, a vision tower is not a language model, and an encoder not a decoder.
    """
    ours, theirs = ({word for word in prefix.split(".") if is_family(word)} for prefix in (off, on))
    if (ours and theirs and ours.isdisjoint(theirs)) or on.split(".")[-2] == off.split(".")[-2]:
        return False
    ours, theirs = ({word for word in re.split(r"[._]", prefix) if word in _KIND} for prefix in (off, on))
    kinds = [
        ({_KIND[word][1] for word in words if _KIND[word][0] == kind}) for kind in _KINDS for words in (ours, theirs)
    ]
    # `model.vision_tower.encoder.` is not `model.`, which is the text of a model. Another word of a tower may stay:
    # `model.video_tower.vision_model.` is `model.video_tower.`.
    kept = {*off.split(".")} & {*on.split(".")} - {"", "model", "transformer"}
    if kinds[0] - {"text"} and not kinds[1] and not kept:
        return False
    return not any(one and other and one.isdisjoint(other) for one, other in zip(kinds[::2], kinds[1::2], strict=True))


def _keeps_parts(off: str, on: str) -> bool:
    """Whether a change of prefixes only adds words, only drops words, or exchanges words that name no part."""
    ours, theirs = off.split(".")[:-1], on.split(".")[:-1]
    dropped = {word for word in ours if word not in theirs}
    return dropped <= {"model", "transformer"} or all(word in ours for word in theirs)


_KINDS: dict[str, dict[str, str]] = {
    "modality": {
        "vision": "vision visual image img pixel",
        "text": "language text llm lang",
        "audio": "audio speech sound",
    },
    "half": {"encoder": "encoder", "decoder": "decoder"},
    "role": {"thinker": "thinker", "talker": "talker"},
}
"""Parts of models that share shapes, and the words that name them in prefixes."""

_KIND = {
    word: (kind, part) for kind, parts in _KINDS.items() for part, words in parts.items() for word in words.split()
}


def _modalities(name: str) -> set[str]:
    """Return which of vision, text and audio a name mentions."""
    return _parts("modality", name)


def _parts(kind: str, name: str) -> set[str]:
    """Return which parts of models, of one of `_KINDS`, a name mentions."""
    return {_KIND[word][1] for word in re.split(r"[._]", name) if _KIND.get(word, ("", ""))[0] == kind}


_ENDINGS: dict[int, tuple[Mapping[str, str], dict[str, list[str]]]] = {}


def _ending(shapes: Mapping[str, str]) -> dict[str, list[str]]:
    """Return end of a template -> the templates that have it; cached for each set of names."""
    known = _ENDINGS.get(id(shapes))
    if known is None or known[0] is not shapes:
        ends: dict[str, list[str]] = {}
        for shape in shapes:
            words = shape.split(".")
            for cut in range(len(words)):
                ends.setdefault(shape_of(".".join(words[cut:])), []).append(shape)
        _ENDINGS.clear()
        known = _ENDINGS[id(shapes)] = (shapes, ends)
    return known[1]


def _shapes(base: Names) -> dict[str, str]:
    """Return template -> one name that has it."""
    if not base.shapes:
        names = [name for name in (*base.paths, *base.outer) if "." in name]
        # All names as one string: a substitution for each of the 90,000 names of a large model takes three times as
        # long.
        templates = _NUMBERS.sub(".#", "\n".join(names)).split("\n")
        if len(templates) != len(names):  # A name with a line break in it, or no names.
            templates = [_template(name) for name in names]
        base.shapes.update(zip(templates, names, strict=True))
        base.shapes.update((shape_of(name), name) for name in (*base.paths, *base.outer) if "." not in name)
    return base.shapes


_NUMBERS = re.compile(r"\.(?:0|[1-9][0-9]{0,8})(?=[.\n]|\Z)")
"""Numbers in names, except a first word that is a number: that one names a part of a pipeline."""


def _template(name: str) -> str:
    """Replace numbers in a name by `#`, as in `_shapes`."""
    return _NUMBERS.sub(".#", name) if "." in name else shape_of(name)


def _swap(name: str, off: str, on: str) -> str:
    return on + name[len(off) :] if name.startswith(off) else name


def _ambiguous(target: str, readings: Sequence[str]) -> TargetNotFound:
    shown = " or ".join(sorted(readings)[:4])
    return TargetNotFound(
        f"two readings fit: it could be {shown}", where=target,
        cure=f"Say which with --rename '{target}={sorted(readings)[0]}' (rename=), or by a shorter prefix of both",
    )  # fmt: skip
