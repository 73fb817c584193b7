"""Map the names in an adapter to the names in a base.

The resolver first applies the user's rules to each target. Then it tries, in this order: the exact name; the name
without the words that wrappers such as FSDP insert; the names in the file of the base's family; another prefix, if it
fits every target with the old prefix. If a name can mean two modules of the base, the resolver raises an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from .architectures import Architecture, WeightPlace, fill, is_family, shape_of
from .moves import (
    PERHAPS,
    WRAPPERS,
    Left,
    Move,
    MoveRule,
    Names,
    PathPart,
    Resolution,
    ambiguous,
    exchangeable,
    keeps_parts,
    modalities_of,
    part_of,
    parts_of,
    related,
    swap,
    template_of,
)
from .renames import Rename, renamed_by
from .tool_names import without_prefix


def resolve(
    targets: Sequence[str],
    base: Names,
    *,
    architecture: Architecture | None = None,
    renames: Sequence[Rename] = (),
    partial: bool = False,
    fits: Fits = lambda *_: True,
) -> Resolution:
    """Map the names in an adapter to the names in a base.

    Args:
        targets: the names in the adapter.
        base: the names in the base.
        architecture: the architecture of the base's family, if a file describes it.
        renames: the user's rules; the first rule that matches a name is used.
        partial: whether the base may lack some targets. If so, the last step may put one prefix in front of all targets
            that are still left, even if the base has only some of the resulting names.
        fits: a function of (target, name in the base) that returns whether their shapes fit. It is called only if
            several names are possible.

    Returns:
        where each target is in the base; `missing` lists the targets that the base lacks.

    Raises:
        TargetNotFound: a target's name can mean two different modules.
    """
    inside = base.without_wrappers
    if inside is not None:
        names, real = inside
        bare = {path: name for name, path in real.items()}
        ours = {bare.get(target, target): target for target in targets}
        resolution_found = resolve(
            list(ours), names, architecture=architecture, renames=renames, partial=partial,
            fits=lambda target, path: fits(ours[target], real.get(path, path)),
        )  # fmt: skip
        count = sum(any(move.path in real for move in moves) for moves in resolution_found.moves.values())
        resolution_found.moves = {
            ours[target]: tuple(replace(move, path=real.get(move.path, move.path)) for move in moves)
            for target, moves in resolution_found.moves.items()
        }
        resolution_found.missing = [ours[target] for target in resolution_found.missing]
        resolution_found.rules.append(MoveRule("wrapper", "in the base", count))
        return resolution_found
    resolution = Resolution()
    left = _by_renames(targets, base, renames, resolution)
    halves: Left = []
    if architecture is not None:
        # If the base has only a bias under a target's name, try the family's file before the exact name, because the
        # weight may have another name. For example, Jev's heads store the bias as `proj.bias`, but the weight as
        # `weight`.
        halves = [each for each in left if base.lacks_weight(each[1]) and each[0] not in base.anywhere]
        left = [each for each in left if each not in halves] if halves else left
    left = _exact(left, base, resolution)
    left = _unwrapped(left, base, resolution)
    left = _of_modules(left)
    if left and architecture is not None:
        left = by_family(left, base, architecture, resolution)
    if halves and architecture is not None:
        left += _exact(by_family(halves, base, architecture, resolution), base, resolution)
    if left:
        loses_a_part = None if architecture is None else family_names(base, architecture).loses_a_part
        left = by_prefixes(left, base, resolution, partial, fits, loses_a_part)
    resolution.missing = [target for target, _ in left]
    return resolution


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
    resolution.rules += [MoveRule("user", text, count) for text, count in counts.items()]
    return left


def _exact(left: Left, base: Names, resolution: Resolution) -> Left:
    rest = []
    for target, name in left:
        if base.has(name, target):
            resolution.moves[target] = (Move(name),)
        else:
            rest.append((target, name))
    if len(rest) < len(left):
        resolution.rules.append(MoveRule("exact", "", len(left) - len(rest)))
    return rest


def _unwrapped(left: Left, base: Names, resolution: Resolution) -> Left:
    """Remove words that wrappers inserted into names, and map the targets whose shortened names are in the base."""
    perhaps = WRAPPERS | PERHAPS
    if not any(word in name for _, name in left for word in perhaps):
        return left
    known = {word for shape in base.templates for word in shape.split(".")}
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
        resolution.rules.append(MoveRule("wrapper", " ".join(f"{word}." for word in sorted(seen)), placed))
    return rest


def _of_modules(left: Left) -> Left:
    """Replace the name of a weight with the name of its module.

    The steps after this one, and the families' files, use the names of modules.

    For example, PEFT's `target_parameters=["mlp.gate.weight"]` names the weight of a router. The router's module is
    `mlp.gate`, and Mixtral's files call this module `block_sparse_moe.gate`.
    """
    return [(target, name.removesuffix(".weight")) for target, name in left]


# Map names with the file of the base's family, which lists how every tool names, fuses and stacks weights.


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
    # Do not map two targets to the same weight. For example, the layers of FLAVA's three encoders differ only in their
    # prefixes. Without the prefixes, all three would be mapped to DPT's only encoder.
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
        resolution.rules.append(MoveRule("architecture", text, count))
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
    """The names that a family's file predicts for a base, including the prefix that the base's names have."""

    def __init__(self, base: Names, architecture: Architecture) -> None:
        self.base, self.architecture = base, architecture
        self.shapes = base.templates
        self.counts: dict[str, int] = {}
        templates = {naming: list(architecture.templates(naming)) for naming in architecture.namings}
        covered = {naming: sum(t in self.shapes for t in known) for naming, known in templates.items()}
        # If the base has more than half of a naming's names unchanged, do not search for prefixes of the other namings,
        # because the search could find a wrong prefix. Still search for a prefix of this naming, because the names of
        # one part of the model may lack a prefix: in Dots 3's class without a head, the text model's names lack it.
        plain = {naming for naming, count in covered.items() if 2 * count > len(templates[naming])}
        self.prefixes = {
            naming: self._prefix(known, bool(plain)) if not plain or naming in plain else ("", "")
            for naming, known in templates.items()
        }

    def readings(self, name: str) -> dict[tuple[Move, ...], tuple[str, str]]:
        """Return a map with one entry for each possible meaning of `name` in the base.

        The key contains the moves from `name` to weights of the base. The value is a pair: the naming that contains
        `name`, and the naming that the base uses. The map is empty if `name` has no meaning in the base.
        """
        readings: dict[tuple[Move, ...], tuple[str, str]] = {}
        rooted = [f"{self.root}.{name}"] if self.root and not name.startswith(f"{self.root}.") else []
        # Also try `name` with each prefix that the family's file has, but the base lacks. If the base is one part of a
        # model, its names lack the part's prefix, and the adapter's names may lack this prefix too.
        rooted += [off + name for off, on in dict.fromkeys(self.prefixes.values()) if off and not on]
        for variant in (*variants(name), *rooted):
            if self.loses_a_part(name, variant):
                continue
            for ours in self.architecture.namings_with(variant):
                weights = self.architecture.find(variant, ours)
                for theirs in self.architecture.namings if weights else ():
                    moves = self._moves(weights, theirs)
                    if moves is not None:
                        readings.setdefault(moves, (ours, theirs))
            if readings:
                break
        return readings

    @cached_property
    def root(self) -> str:
        """Return the prefix that the family's classes with a head add to the model's names, such as `vit` for a ViT.

        transformers calls this prefix `base_model_prefix`. Return an empty string if the prefix is not the name of a
        family; for example, `model` is not.

        `AutoModel` loads the class without a head, so the names in an adapter for this class lack the prefix. An
        example is `layers.0.attention.q_proj`.
        """
        weights = self.architecture.record.weights
        firsts = Counter(weight.partition(".")[0] for weight in weights)
        (word, count), *_ = firsts.most_common(1) or [("", 0)]
        if 2 * count > firsts.total() and is_family(word):
            return word
        # ViT-MAE's file has the encoder's weights with and without `vit.`, and as many weights of a decoder.
        return next((word for word in firsts if is_family(word) and any(f"{word}.{w}" in weights for w in weights)), "")

    def loses_a_part(self, name: str, suffix: str) -> bool:
        """Whether shortening `name` to `suffix` removes the only word that names a part of the model.

        For example, ERNIE's `model.vision_tower.blocks.0` must not be mapped to Cosmos's `blocks.0`. Cosmos calls its
        own vision part `visual`, so a `vision_tower` is a part of another model.
        """
        if not name.endswith(suffix):
            return False
        off = [word for word in name[: -len(suffix)].split(".") if word and word not in self.words]
        roles, ours = parts_of("role", ".".join(off)), parts_of("role", self.architecture.family)
        if roles and ours and roles.isdisjoint(ours):
            return True
        lost = set[str]().union(*(modalities_of(word) for word in off)) - {"text"} - modalities_of(suffix)
        return bool(lost and (lost & self.modalities or self.text_alone))

    @cached_property
    def text_alone(self) -> bool:
        """Whether the family is only a text decoder: its file has a vocabulary, but no encoder, vision or audio part.

        Targets in a vision tower must not be mapped to such a family, even if the names are equal. For example, the
        layers of Gemma 3's vision tower and of its text model have the same names.
        """
        return bool(self.architecture.record.vocabulary) and not self.modalities and "encoder" not in self.words

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Return the modalities (vision, text, audio) to which words in the family's names refer."""
        return frozenset[str]().union(*(modalities_of(word) for word in self.words))

    @cached_property
    def words(self) -> frozenset[str]:
        """Split all names of the family, in all namings, at the dots, and return the set of words."""
        every = (self.architecture.templates(naming) for naming in self.architecture.namings)
        return frozenset(word for templates in every for name in templates for word in name.split("."))

    def _prefix(self, templates: Sequence[str], in_part: bool = False) -> tuple[str, str]:
        """Find the change of prefix that turns the most names of a naming into names in the base.

        Return it as (removed prefix, added prefix). Return `("", "")` if no change helps. For example, if a model is
        saved without its head, its names lose a prefix.

        Args:
            templates: the names in the naming.
            in_part: whether the base has most names of the naming without any change. If so, a prefix is replaced only
                if the base has all names with the new prefix, and none of the same names with the old prefix.
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
        """Whether the base lacks all names that begin with `off`, but has all of them if `on` replaces `off`."""
        part = [template for template in templates if template.startswith(off)]
        return bool(off) and all(
            template not in self.shapes and swap(template, off, on) in self.shapes for template in part
        )

    def _moves(self, weights: Sequence[WeightMatch], naming: str) -> tuple[Move, ...] | None:
        moves = moves_to(
            self.architecture, weights, naming, lambda place, numbers: self._path(place, numbers, naming),
            lambda place, numbers: self._experts(place, numbers, naming),
        )  # fmt: skip
        if not moves or any(move.path not in self.base.paths for move in moves):
            return None
        return None if len(moves) == 1 and self.base.lacks_weight(moves[0].path) else moves

    def _path(self, place: WeightPlace, numbers: Mapping[str, str], naming: str) -> str:
        return swap(fill(place.name, numbers), *self.prefixes[naming])

    def _experts(self, place: WeightPlace, numbers: Mapping[str, str], naming: str) -> int:
        """Return the number of experts. For a stack, use the base's config; else count the experts' names."""
        if place.stacked:
            return self.base.experts
        each = self._path(place, {**numbers, "{e}": "{e}"}, naming)
        if each not in self.counts:
            count = 0
            while each.replace("{e}", str(count)) in self.base.paths:
                count += 1
            self.counts[each] = count
        return self.counts[each] // (1 if place.half is None else 2)


WeightMatch = tuple[str, WeightPlace, dict[str, str]]
"""One result of `Architecture.find`: (key of a weight, its `WeightPlace`, numbers for the placeholders).

The `WeightPlace` describes the weight in the naming in which `find` searched.
"""


def moves_to(
    architecture: Architecture,
    weights: Sequence[WeightMatch],
    naming: str,
    path: Callable[[WeightPlace, Mapping[str, str]], str],
    experts: Callable[[WeightPlace, Mapping[str, str]], int],
    orders: bool = True,
) -> tuple[Move, ...] | None:
    """Return the moves from a name to the tensors that store the same weights in another naming.

    Return None if the other naming lacks one of the weights. With `orders`, also return None if one of the namings
    stores the rows of one weight in two tensors.

    Args:
        architecture: the family.
        weights: the result of `Architecture.find` for the name.
        naming: the other naming.
        path: a function of (place, numbers) that returns the name of a tensor in the other naming. It replaces the
            placeholders in the name by the numbers.
        experts: a function of (place, numbers) that returns the number of experts.
        orders: whether the moves record that the two namings order rows differently. False for callers that reorder
            the rows themselves.
    """
    moves: list[Move] = []
    for weight, ours, numbers in weights:
        theirs = architecture.place(weight, naming)
        if theirs is None or (orders and (ours.beside or theirs.beside)):
            return None  # A weight whose rows are in two tensors cannot be mapped to one tensor.
        take, into = part_of(ours), part_of(theirs)
        before, after = (WeightPlace("", rows=place.rows, heads=place.heads) for place in (ours, theirs))
        turn = (before, after) if orders and before != after else None
        if ours.half is not None:
            # The experts of two weights are numbered as one sequence. Compute the expert's index within its own weight.
            count = experts(theirs, numbers)
            expert_in_half = int(numbers["{e}"]) - ours.half * count
            if not 0 <= expert_in_half < count:
                continue
            numbers = {**numbers, "{e}": str(expert_in_half)}
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
    """Translate a target's name to another naming, without a base.

    Return the moves from the name to the tensors that store the same weights in the other naming, or None if the other
    naming lacks one of the weights. The moves do not record the order of rows, because each format reorders rows
    itself.

    Args:
        name: the name of a target.
        architecture: the family.
        naming: the naming to translate to.
        experts: the number of experts, in case the weight is a stack of experts.

    Raises:
        TargetNotFound: the name can mean two different weights.
    """
    translations: dict[tuple[Move, ...], None] = {}
    for variant in variants(name):
        for ours in architecture.namings_with(variant):
            moves = moves_to(
                architecture, architecture.find(variant, ours), naming,
                lambda place, numbers: fill(place.name, numbers), lambda *_: experts, orders=False,
            )  # fmt: skip
            if moves:
                translations[moves] = None
        if translations:
            break
    if len(translations) > 1:
        raise ambiguous(name, [moves[0].path for moves in translations])
    return next(iter(translations), None)


def _joined(moves: list[Move]) -> tuple[Move, ...]:
    """Replace the moves of all parts of a tensor by one move of the tensor, if each part keeps its position."""
    first = moves[0]
    same = all((m.path, m.take, m.expert, m.slot) == (first.path, m.into, first.expert, first.slot) for m in moves)
    plain = all(move.turn is None for move in moves)
    if same and plain and first.take is not None and len(moves) == first.take.of:
        return (Move(first.path, expert=first.expert, slot=first.slot),)
    return tuple(moves)


def variants(name: str) -> Iterator[str]:
    """Yield a name, then the name without its first one, two or three words, then the name with `model.` in front.

    A model's classes with different heads, and its class without a head, use different first words.
    """
    yield name
    words = name.split(".")
    for cut in range(1, min(len(words), 4)):
        if words[cut - 1].isdigit():
            break
        yield ".".join(words[cut:])
    yield f"model.{name}"
    # Also replace the prefix of a language model inside a larger model by `model.`. Do not replace other prefixes by
    # `model.`: they may name a vision tower, and its layers may have the same names as the language model's layers.
    yield from without_prefix(name)


# Map names by replacing a prefix.
#
# A replacement is accepted if it maps every target that has the prefix to a name in the base.


Fits = Callable[[str, str], bool]
"""A function of (name in the adapter, name in the base) that returns whether the shapes of both fit."""


def by_prefixes(
    left: Left,
    base: Names,
    resolution: Resolution,
    partial: bool,
    fits: Fits,
    loses_a_part: Callable[[str, str], bool] | None = None,
) -> Left:
    """Map targets by replacing a prefix; each replacement must map every target that has the prefix.

    A replacement must not remove the name of a part of the model, such as a vision tower. `loses_a_part` checks this
    with the names in the file of the base's family. A replacement may change the name of a part, because the same part
    has different names in different families: the text part is `model.text_model.` in Idefics, and
    `language_model.model.` in LLaVA.

    Args:
        left: the targets that are not mapped yet.
        base: the names in the base.
        resolution: the result; the function adds moves and rules to it.
        partial: whether the base may lack some targets. If so, the last step puts one prefix in front of all targets
            that are still left: the prefix that maps the most of these targets to the base. The step is skipped if two
            prefixes map equally many.
        fits: a function of (target, name in the base) that returns whether their shapes fit.
        loses_a_part: a function of (name, changed name) that returns whether the change removes the name of a part;
            None if the family is unknown.

    Returns:
        the targets that are still not mapped.

    Raises:
        TargetNotFound: a prefix has several replacements, and each maps every target that has the prefix.
    """
    templates = _trials(left, base)
    if loses_a_part is not None:
        templates = {
            name: {p for p in pairs if keeps_parts(*p) and not loses_a_part(name, swap(name, *p))}
            for name, pairs in templates.items()
        }
    # Try to replace the shortest prefix first, because the old and the new name then share a longer ending. For
    # example, `decoder.layers` becomes `model.decoder.layers`, not `model.encoder.layers`, although both would fit.
    prefixes = sorted(
        {off for trials in templates.values() for off, _ in trials}, key=lambda prefix: (prefix.count("."), prefix)
    )
    # Exclude names of the base to which another target is already mapped. Otherwise a decoder's layers could be mapped
    # to the encoder.
    taken = {move.path for moves in resolution.moves.values() for move in moves}
    rest, changed = left, True
    while rest and changed:
        # Start over after each replaced prefix, because a replacement that failed before may fit all targets that are
        # left. For example, once the targets with the prefix `model.text.` are mapped, one replacement may fit all
        # other targets with the prefix `model.`.
        changed = False
        for off in prefixes:
            group = [(target, name) for target, name in rest if name.startswith(off)]
            on = _exchanged(group, off, templates, base, taken, fits) if group else None
            if on is not None:
                rest = _placed(group, rest, off, on, base, taken, resolution)
                changed = True
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
    """Return the replacement for the prefix `off` that maps every target of a group; None if there is none.

    Raises:
        TargetNotFound: several replacements map every target of the group.
    """
    full = [on for on, count in _tried(group, off, templates, base, taken).items() if count == len(group)]
    if full:
        # Also try to change only the first words of the prefix. For example, VibeVoice has two towers with the same
        # names and shapes, `acoustic.` and `semantic.`. The prefix `model.acoustic.` is mapped to the right tower only
        # if `model.` alone is removed.
        full += [
            on for on in _shorter(group, off, templates)
            if on not in full and all(_lands(target, name, off, on, base, taken) for target, name in group)
        ]  # fmt: skip
    if len(full) > 1:
        full = [on for on in full if all(fits(target, swap(name, off, on)) for target, name in group)] or full
    if len(full) > 1:
        full = _keeping_words(off, full) or full
    if len(full) > 1:
        target, name = group[0]
        raise ambiguous(target, [swap(name, off, on) for on in full])
    return full[0] if full else None


def _shorter(group: Left, off: str, templates: Mapping[str, set[tuple[str, str]]]) -> list[str]:
    """For the prefix `off`, list the replacements that change only the first words of `off`."""
    ours = sorted({template_of(name) for _, name in group})
    changes = {(front, on) for template in ours for front, on in templates[template] if front and front != off}
    return sorted({on + off[len(front) :] for front, on in changes if off.startswith(front)})


def _keeping_words(off: str, candidates: Sequence[str]) -> list[str]:
    """If exactly one candidate differs from `off` only by added words, or only by removed words, return it in a list.

    If no candidate or several candidates differ in this way, return an empty list. Also return an empty list if the
    candidate keeps no words of `off` except `model` and `transformer`, or if another candidate also keeps all words of
    `off` that this candidate keeps.

    For example, Video-LLaVA has two towers of the same shape, and `image_tower.vision_model.` becomes `image_tower.`,
    not `video_tower.`.
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
    """For each possible replacement of the prefix `off`, count the targets that it maps to names in the base.

    Names in `taken` do not count.
    """
    ours = sorted({template_of(name) for _, name in group})
    tried = dict.fromkeys([on for template in ours for prefix, on in sorted(templates[template]) if prefix == off], 0)
    for on in tried:
        tried[on] = sum(_lands(target, name, off, on, base, taken) for target, name in group)
    return tried


def _placed(group: Left, rest: Left, off: str, on: str, base: Names, taken: set[str], resolution: Resolution) -> Left:
    """Map a group's targets by replacing `off` with `on`; return the targets of `rest` that are still not mapped."""
    placed = 0
    for target, name in group:
        if _lands(target, name, off, on, base, taken):
            resolution.moves[target] = (Move(swap(name, off, on)),)
            placed += 1
    taken.update(resolution.moves[target][0].path for target, _ in group if target in resolution.moves)
    resolution.prefixes.append((off, on))
    resolution.rules.append(MoveRule("prefix", f"{off or '(none)'} -> {on or '(none)'}", placed))
    return [(target, name) for target, name in rest if target not in resolution.moves]


def _trials(left: Left, base: Names) -> dict[str, set[tuple[str, str]]]:
    """Return a map from each template to the changes of prefix to try, as (removed, added).

    If the removed prefix contains a number, the change is tried only if all names of the template have the same number.
    """
    names: dict[str, list[str]] = {}
    for _, name in left:
        names.setdefault(template_of(name), []).append(name)
    fronts_by_template: dict[str, set[tuple[str, str]]] = {}
    for template, several in names.items():
        fronts_by_template[template] = set()
        for off, on in ends(template, base):
            words = off.count(".")
            fronts = {".".join(name.split(".", words)[:words]) + "." for name in several} if "#" in off else {off}
            if len(fronts) == 1:
                fronts_by_template[template].add((fronts.pop(), on))
    return fronts_by_template


def _lands(target: str, name: str, off: str, on: str, base: Names, taken: Collection[str]) -> bool:
    path = swap(name, off, on)
    return path not in taken and base.has(path, target)


def ends(template: str, base: Names) -> set[tuple[str, str]]:
    """Return the changes of prefix, as (removed, added), that turn a template into a template of the base.

    A change adds no layer number, and keeps the word before the first number. So it renames the modules around
    `layers.#`, but not `layers` itself. A change that only removes a prefix may also remove `layers.#`. If the rest of
    the template has no layer number, the two prefixes must be `related`.
    """
    words = template.split(".")
    keep = max(words.index("#") - 1 if "#" in words else len(words) - 1, 0)
    pairs = set()
    for cut in range(len(words)):
        end = shape_of(".".join(words[cut:]))
        for shape in base.endings.get(end, ()):
            on = "".join(f"{word}." for word in shape.split(".")[: shape.count(".") + 1 - (len(words) - cut)])
            off = "".join(f"{word}." for word in words[:cut])
            # If no prefix is added, allow the change to remove a number: the base may be a single layer of a model.
            whole = cut <= keep or not on
            # Without a layer number, the common ending can be a word such as `dense`, which modules of several heads
            # have: `lm_head.dense` is not `pooler.dense`.
            likely = "#" in end or related(off, on)
            if whole and "#" not in on and likely and (not on or not off or exchangeable(off, on)):
                pairs.add((off, on))
    return pairs
