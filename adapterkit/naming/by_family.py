"""Map names by the file of a base's family, which lists all namings, with fused, split and stacked weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from .architectures import Architecture, Place, fill, is_family
from .by_prefixes import ends
from .moves import Move, PathPart, Resolution, Rule, ambiguous, part_of
from .parts import modalities_of, parts_of
from .stored_names import Left, Names, swap
from .tables import without_prefix


def by_family(left: Left, base: Names, architecture: Architecture, resolution: Resolution) -> Left:
    """Map targets by the file of the base's family; return the targets that the file does not map.

    Raises:
        TargetNotFound: two readings of a target's name fit.
    """
    known = family_names(base, architecture)
    rest, counts = list[tuple[str, str]](), dict[tuple[str, str], int]()
    placed: list[tuple[str, str, tuple[Move, ...], tuple[str, str]]] = []
    for target, name in left:
        readings = known.readings(name)
        if len(readings) > 1:
            raise ambiguous(target, [moves[0].path for moves in readings])
        if readings:
            placed.append((target, name, *next(iter(readings.items()))))
        else:
            rest.append((target, name))
    # Check that removing prefixes makes no two targets equal: FLAVA has three encoders whose names DPT has only once.
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
    """Return the part of the base that a move writes: path, rows, slice of a stack."""
    return move.path, move.into, move.slot


def family_names(base: Names, architecture: Architecture) -> FamilyNames:
    """Return the names of a family's file for a base; they are computed once for each base and family."""
    known = base.families.get(architecture.family)
    if not isinstance(known, FamilyNames) or known.architecture is not architecture:
        known = base.families[architecture.family] = FamilyNames(base, architecture)
    return known


class FamilyNames:
    """The names that a family's file implies for a base, with the base's own prefix."""

    def __init__(self, base: Names, architecture: Architecture) -> None:
        self.base, self.architecture = base, architecture
        self.shapes = base.templates
        self.counts: dict[str, int] = {}
        templates = {naming: list(architecture.templates(naming)) for naming in architecture.namings}
        covered = {naming: sum(t in self.shapes for t in known) for naming, known in templates.items()}
        # Search no prefix if the base has the exact names of one naming, because the search could find a wrong prefix.
        # But in a class without a head, one part may have another prefix, like Dots 3's text model next to its towers.
        plain = {naming for naming, count in covered.items() if 2 * count > len(templates[naming])}
        self.prefixes = {
            naming: self._prefix(known, bool(plain)) if not plain or naming in plain else ("", "")
            for naming, known in templates.items()
        }

    def readings(self, name: str) -> dict[tuple[Move, ...], tuple[str, str]]:
        """Return every distinct way to map a name, with its source and destination naming."""
        found: dict[tuple[Move, ...], tuple[str, str]] = {}
        rooted = [f"{self.root}.{name}"] if self.root and not name.startswith(f"{self.root}.") else []
        # Also try prefixes that the base lacks: a base that is one part of a model has names without the part's prefix,
        # but its adapter may have the prefix.
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
        """Return the module that holds the headless class inside other classes: `vit` for a ViT; empty for `model`.

        `AutoModel` loads the headless class, so its adapters' names lack this word: `layers.0.attention.q_proj`.
        """
        firsts = Counter(weight.partition(".")[0] for weight in self.architecture.record.weights)
        (word, count), *_ = firsts.most_common(1) or [("", 0)]
        return word if 2 * count > firsts.total() and is_family(word) else ""

    def loses_a_part(self, name: str, own: str) -> bool:
        """Whether a removed prefix contained the only word that says which part of a model the name belongs to.

        An ERNIE's `model.vision_tower.blocks.0` is not the `blocks.0` of Cosmos, whose family names the vision part
        `visual`.
        """
        if not name.endswith(own):
            return False
        off = [word for word in name[: -len(own)].split(".") if word and word not in self.words]
        roles, ours = parts_of("role", ".".join(off)), parts_of("role", self.architecture.family)
        if roles and ours and roles.isdisjoint(ours):
            return True
        lost = set[str]().union(*(modalities_of(word) for word in off)) - {"text"} - modalities_of(own)
        return bool(lost and (lost & self.modalities or self.text_alone))

    @cached_property
    def text_alone(self) -> bool:
        """Whether the family is a text decoder: its file has a vocabulary, and names no other part of a model.

        Gemma 3's text model has no vision tower, although names of the tower's layers also occur in its own layers.
        """
        return bool(self.architecture.record.vocabulary) and not self.modalities and "encoder" not in self.words

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Return those of vision, text and audio that the family's words mention."""
        return frozenset[str]().union(*(modalities_of(word) for word in self.words))

    @cached_property
    def words(self) -> frozenset[str]:
        """Return the words of the family's names, in all namings."""
        every = (self.architecture.templates(naming) for naming in self.architecture.namings)
        return frozenset(word for templates in every for name in templates for word in name.split("."))

    def _prefix(self, templates: Sequence[str], in_part: bool = False) -> tuple[str, str]:
        """Find the prefix that names lack or add in the base; saving without a head drops a prefix.

        Args:
            templates: the names in the naming.
            in_part: whether the base has exact names of the family. If so, no name of the base may begin with the
                prefix, and all names in the naming that begin with it must exist in the base without the prefix.
        """
        best, most = ("", ""), sum(template in self.shapes for template in templates)
        trials = {(off, on) for template in templates for off, on in ends(template, self.base) if "#" not in off}
        for off, on in sorted(trials):
            if in_part and not self._moves_a_part(templates, off, on):
                continue
            count = sum(swap(template, off, on) in self.shapes for template in templates)
            if count > most:
                best, most = (off, on), count
        return best

    def _moves_a_part(self, templates: Sequence[str], off: str, on: str) -> bool:
        """Whether the base has a whole part of a naming under another prefix, and nothing under the naming's own."""
        part = [template for template in templates if template.startswith(off)]
        return bool(off) and all(
            template not in self.shapes and swap(template, off, on) in self.shapes for template in part
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
        return swap(fill(place.name, numbers), *self.prefixes[naming])

    def _experts(self, place: Place, numbers: Mapping[str, str], naming: str) -> int:
        """Return the number of the weight's experts in the base; for a stack, the number is from the base's config."""
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
"""(key of a weight, its place in the naming of the name, the placeholders' numbers)."""


def moves_to(
    architecture: Architecture,
    weights: Sequence[Found],
    naming: str,
    path: Callable[[Place, Mapping[str, str]], str],
    experts: Callable[[Place, Mapping[str, str]], int],
    orders: bool = True,
) -> tuple[Move, ...] | None:
    """Return the places of a name's weights in another naming; None if that naming lacks one of the weights.

    Args:
        architecture: the family.
        weights: the result of `Architecture.find` for the name.
        naming: the other naming.
        path: returns a place's name, with numbers for its placeholders.
        experts: returns the number of experts of a place's weight.
        orders: whether to report rows in another order; False for callers that handle orders themselves.
    """
    moves: list[Move] = []
    for weight, ours, numbers in weights:
        theirs = architecture.place(weight, naming)
        if theirs is None or (orders and (ours.beside or theirs.beside)):
            return None  # Rows that are divided between two tensors cannot be moved together.
        take, into = part_of(ours), part_of(theirs)
        before, after = (Place("", rows=place.rows, heads=place.heads) for place in (ours, theirs))
        turn = (before, after) if orders and before != after else None
        if ours.half is not None:
            # The expert's number counts the experts of two weights together. Map it to the number in one of the two
            # weights.
            count = experts(theirs, numbers)
            own = int(numbers["{e}"]) - ours.half * count
            if not 0 <= own < count:
                continue
            numbers = {**numbers, "{e}": str(own)}
        if ours.stacked and not theirs.stacked:
            count = experts(theirs, numbers)
            first = count * (theirs.half or 0)
            # Replace the other placeholders once for all experts: a large model has tens of thousands of experts.
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
    """Find the places of a name in one of its family's namings, without a base; None if the naming lacks it.

    The rows keep their order, because formats reorder rows for their files themselves.

    Args:
        name: the name of a target.
        architecture: the family.
        naming: the naming to translate to.
        experts: the number of experts in a stack with this name.

    Raises:
        TargetNotFound: two readings of the name lead to different weights.
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
        raise ambiguous(name, [moves[0].path for moves in found])
    return next(iter(found), None)


def _joined(moves: list[Move]) -> tuple[Move, ...]:
    """Join moves of parts that are adjacent on both sides, in one tensor."""
    first = moves[0]
    same = all((m.path, m.take, m.expert, m.slot) == (first.path, m.into, first.expert, first.slot) for m in moves)
    plain = all(move.turn is None for move in moves)
    if same and plain and first.take is not None and len(moves) == first.take.of:
        return (Move(first.path, expert=first.expert, slot=first.slot),)
    return tuple(moves)


def variants(name: str) -> Iterator[str]:
    """Yield a name, then its forms in a class with another head or none: without prefixes, or with `model.` added."""
    yield name
    words = name.split(".")
    for cut in range(1, min(len(words), 4)):
        if words[cut - 1].isdigit():
            break
        yield ".".join(words[cut:])
    yield f"model.{name}"
    # Also remove the prefixes of a language model inside a larger model. Other first words are kept, because they may
    # name a vision tower, whose layers have the same names.
    yield from without_prefix(name)
