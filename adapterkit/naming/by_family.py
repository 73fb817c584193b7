"""Map names with the file of the base's family, which lists how every tool names, fuses and stacks weights."""

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
    """Map targets with the file of the base's family; return the targets that the file does not map.

    Raises:
        TargetNotFound: a target's name can mean two different modules.
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
    # Do not map two targets to the same weight: FLAVA has three encoders, and without their prefixes their names are
    # those of DPT's only encoder.
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
    """Return the part of the base that a move writes: (path, rows, index in a stack)."""
    return move.path, move.into, move.slot


def family_names(base: Names, architecture: Architecture) -> FamilyNames:
    """Return the `FamilyNames` of a base and a family, from the base's cache if possible."""
    known = base.families.get(architecture.family)
    if not isinstance(known, FamilyNames) or known.architecture is not architecture:
        known = base.families[architecture.family] = FamilyNames(base, architecture)
    return known


class FamilyNames:
    """The names that a family's file predicts for a base, with the prefix that the base's names have."""

    def __init__(self, base: Names, architecture: Architecture) -> None:
        self.base, self.architecture = base, architecture
        self.shapes = base.templates
        self.counts: dict[str, int] = {}
        templates = {naming: list(architecture.templates(naming)) for naming in architecture.namings}
        covered = {naming: sum(t in self.shapes for t in known) for naming, known in templates.items()}
        # If the base has most names of one naming exactly, do not search prefixes of the other namings: the search
        # could find a wrong prefix. In the naming that fits, one part may still need a prefix: in Dots 3's class
        # without a head, the names of the text model lack a prefix, but those of the towers do not.
        plain = {naming for naming, count in covered.items() if 2 * count > len(templates[naming])}
        self.prefixes = {
            naming: self._prefix(known, bool(plain)) if not plain or naming in plain else ("", "")
            for naming, known in templates.items()
        }

    def readings(self, name: str) -> dict[tuple[Move, ...], tuple[str, str]]:
        """Return every distinct way to map a name to the base, with two namings: the name's and the base's."""
        found: dict[tuple[Move, ...], tuple[str, str]] = {}
        rooted = [f"{self.root}.{name}"] if self.root and not name.startswith(f"{self.root}.") else []
        # Also try the name with prefixes that the base lacks. If the base is one part of a model, its names lack the
        # part's prefix, but the adapter's names may have the prefix.
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
        """Return the name that the class without a head has inside the family's other classes: `vit` for a ViT.

        Empty if this name, such as `model`, is not the name of a family.

        `AutoModel` loads the class without a head, so names in an adapter for it lack this word:
        `layers.0.attention.q_proj`.
        """
        firsts = Counter(weight.partition(".")[0] for weight in self.architecture.record.weights)
        (word, count), *_ = firsts.most_common(1) or [("", 0)]
        return word if 2 * count > firsts.total() and is_family(word) else ""

    def loses_a_part(self, name: str, own: str) -> bool:
        """Whether `own`, which is `name` without a prefix, lacks the only word that names a part of the model.

        For example, ERNIE's `model.vision_tower.blocks.0` is not Cosmos's `blocks.0`: Cosmos calls its vision part
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
        """Whether the family is only a text decoder: its file has a vocabulary, but no encoder, vision or audio part.

        Such a family must not match the layers of a vision tower, even if names are equal: Gemma 3's tower and its text
        model share names.
        """
        return bool(self.architecture.record.vocabulary) and not self.modalities and "encoder" not in self.words

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Return the modalities (vision, text, audio) that words in the family's names mention."""
        return frozenset[str]().union(*(modalities_of(word) for word in self.words))

    @cached_property
    def words(self) -> frozenset[str]:
        """Return the dotted parts of all names of the family, in all namings."""
        every = (self.architecture.templates(naming) for naming in self.architecture.namings)
        return frozenset(word for templates in every for name in templates for word in name.split("."))

    def _prefix(self, templates: Sequence[str], in_part: bool = False) -> tuple[str, str]:
        """Find the change of prefix, as (removed, added), that maps most names of a naming to the base.

        Saving a model without its head drops a prefix.

        Args:
            templates: the names in the naming.
            in_part: whether the base has some of the family's names without any change. If so, a prefix is changed only
                if that maps every name with this prefix to the base, and the base has none of these names unchanged.
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
        """Whether the base has all names with the prefix `off` under `on`, and none of them under `off`."""
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
        """Return the number of experts: for a stack from the base's config, otherwise by counting names in the base."""
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
"""(key of a weight, its `Place` in the naming of the searched name, numbers for the placeholders).

See `Architecture.find`.
"""


def moves_to(
    architecture: Architecture,
    weights: Sequence[Found],
    naming: str,
    path: Callable[[Place, Mapping[str, str]], str],
    experts: Callable[[Place, Mapping[str, str]], int],
    orders: bool = True,
) -> tuple[Move, ...] | None:
    """Return where the weights of a name are in another naming; None if that naming lacks one of the weights.

    Args:
        architecture: the family.
        weights: the result of `Architecture.find` for the name.
        naming: the other naming.
        path: a function of (place, numbers) that returns the place's name with the numbers filled in.
        experts: a function of (place, numbers) that returns the number of experts.
        orders: whether to record that the namings order rows differently; False for callers that reorder rows
            themselves.
    """
    moves: list[Move] = []
    for weight, ours, numbers in weights:
        theirs = architecture.place(weight, naming)
        if theirs is None or (orders and (ours.beside or theirs.beside)):
            return None  # A weight whose rows are in two tensors cannot be mapped to one tensor.
        take, into = part_of(ours), part_of(theirs)
        before, after = (Place("", rows=place.rows, heads=place.heads) for place in (ours, theirs))
        turn = (before, after) if orders and before != after else None
        if ours.half is not None:
            # The experts of two weights are numbered together. Compute the expert's number within its own weight.
            count = experts(theirs, numbers)
            own = int(numbers["{e}"]) - ours.half * count
            if not 0 <= own < count:
                continue
            numbers = {**numbers, "{e}": str(own)}
        if ours.stacked and not theirs.stacked:
            count = experts(theirs, numbers)
            first = count * (theirs.half or 0)
            # Fill in the other placeholders once, not once per expert: a large model has tens of thousands of experts.
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
    """Find where the weights of a name are in another naming of the family, without a base.

    None if the naming lacks them.

    The result records no orders of rows, because each format reorders rows itself.

    Args:
        name: the name of a target.
        architecture: the family.
        naming: the naming to translate to.
        experts: the number of experts in a stack with this name.

    Raises:
        TargetNotFound: the name can mean two different weights.
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
    """Replace moves of all parts of one tensor by one move of the whole tensor, if both namings have the same parts."""
    first = moves[0]
    same = all((m.path, m.take, m.expert, m.slot) == (first.path, m.into, first.expert, first.slot) for m in moves)
    plain = all(move.turn is None for move in moves)
    if same and plain and first.take is not None and len(moves) == first.take.of:
        return (Move(first.path, expert=first.expert, slot=first.slot),)
    return tuple(moves)


def variants(name: str) -> Iterator[str]:
    """Yield a name, then the name without its first words, then with `model.` added.

    Such names occur in classes with another head or without a head.
    """
    yield name
    words = name.split(".")
    for cut in range(1, min(len(words), 4)):
        if words[cut - 1].isdigit():
            break
        yield ".".join(words[cut:])
    yield f"model.{name}"
    # Also remove the prefix of a language model inside a larger model. Do not remove other words: they may name a
    # vision tower, whose layers have the same names.
    yield from without_prefix(name)
