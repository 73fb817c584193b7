"""One model type's entries: canonical weight -> its place in each naming, as templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pairing import Piece, live, pair, stored
from tiny import tiny

HOLES = ("{n}", "{m}", "{k}", "{j}")
LEAVES = {0: "gate_proj", 1: "up_proj"}
LIVE, HUB = "transformers5", "hub"
Place = dict[str, Any]


@dataclass(slots=True)
class Entries:
    """What goes into one file.

    Attributes:
        weights: canonical template -> naming -> place; a naming that is left out and keyed has the template itself.
        vocabulary: templates of weights with a row or a column a token.
        tied: template of a head -> template of the embedding whose tensor it shares, where the config says so.
    """

    weights: dict[str, dict[str, Place]] = field(default_factory=dict)
    vocabulary: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, several: Mapping[str, Entries]) -> Entries:
        """The entries of look-alikes as those of one family.

        Raises:
            ValueError: two of them keep a weight in different places.
        """
        whole = cls()
        for model_type, each in several.items():
            for weight, places in each.weights.items():
                if whole.weights.setdefault(weight, places) != places:
                    raise ValueError(f"{model_type}: {weight} is elsewhere than in {next(iter(several))}")
            whole.vocabulary += [name for name in each.vocabulary if name not in whole.vocabulary]
            whole.tied |= each.tied
        return whole


def entries_of(model_type: str) -> Entries:
    """The entries of one model type, from a tiny model of it.

    Raises:
        LookupError: a parameter is not among the stored tensors.
        ValueError: names do not become templates.
    """
    model = tiny(model_type)
    ours, theirs = live(model), stored(model)
    entries = Entries()
    groups: dict[tuple[Any, ...], list[tuple[list[str], list[str], Piece]]] = {}
    for a, b in pair(ours, theirs):
        own, other = module_of(a.name), module_of(b.name)
        if a.name.endswith(".bias") and f"{own}.weight" in ours:
            continue
        of = _of(a), _of(b)
        key = (_shape(own), _shape(other), *of, a.expert is not None, b.expert is not None, a.transposed, b.transposed)
        groups.setdefault(key, []).append((_numbers(own), _numbers(other), a))
    for key, cases in groups.items():
        _add(entries, key, cases)
    _halves(entries)
    _by_heads(entries)
    ends = [end for end in (_end(model, "input"), _end(model, "output")) if end is not None]
    for path, module in model.named_modules():
        if any(module is end for end in ends):
            template = _template(path)
            if template in entries.weights and template not in entries.vocabulary:
                entries.vocabulary.append(template)
    return entries


def _end(model: Any, which: str) -> Any:
    """The embedding or the head of a model; None for a model that has none."""
    try:
        return getattr(model, f"get_{which}_embeddings")()
    except NotImplementedError:
        return None


def module_of(name: str) -> str:
    """A parameter's module, or the parameter where it is no weight or bias of one."""
    head, _, leaf = name.rpartition(".")
    return head if leaf in ("weight", "bias") and head else name


def _of(piece: Piece) -> tuple[int, int] | None:
    """Which equal part of its tensor a piece is, as (part, of)."""
    if piece.whole:
        return None
    size = piece.stop - piece.start
    if piece.of % size or piece.start % size:
        raise ValueError(f"{piece.name}: rows {piece.start} to {piece.stop} of {piece.of} are no equal part")
    return piece.start // size, piece.of // size


def _add(entries: Entries, key: tuple[Any, ...], cases: list[tuple[list[str], list[str], Piece]]) -> None:
    own, other, own_part, other_part, own_stacked, other_stacked, own_turned, other_turned = key
    holes = _holes(own)
    there, half = _matched(other, holes, cases)
    ours, theirs = _fill(own, holes), _fill(other, there)
    weight = ours
    if own_part is not None or own_stacked:
        parent, _, leaf = ours.rpartition(".")
        leaf = LEAVES[own_part[0]] if own_part is not None and own_part[1] == 2 else leaf
        weight = f"{parent}.{{e}}.{leaf}" if own_stacked or "{e}" in theirs else f"{parent}.{leaf}"
    places: dict[str, Place] = {}
    for naming, name, part, stacked, turned in (
        (LIVE, ours, own_part, own_stacked and "{e}" not in ours, own_turned),
        (HUB, theirs, other_part, other_stacked and "{e}" not in theirs, other_turned),
    ):
        place: Place = {"name": name}
        if stacked:
            place["stacked"] = True
        if part is not None:
            place |= {"part": part[0], "of": part[1]}
        if turned:
            place["transposed"] = True
        if half and naming == HUB:
            place["half"] = 1
        if place != {"name": weight}:
            places[naming] = place
    if entries.weights.setdefault(weight, places) != places:
        raise ValueError(f"{weight} has two places: {places} and {entries.weights[weight]}")


def _halves(entries: Entries) -> None:
    """Say which weight has the first experts of those that another weight's are counted on from."""
    second = {places[HUB]["name"] for places in entries.weights.values() if "half" in places.get(HUB, {})}
    for weight, places in entries.weights.items():
        place = places.get(HUB, {"name": weight})
        if place["name"] in second and "half" not in place:
            places[HUB] = {**place, "half": 0}


def _by_heads(entries: Entries) -> None:
    """Say `qkv` where a tensor has three parts of which the first is larger: queries, and fewer keys and values."""
    for naming in (LIVE, HUB):
        parts: dict[str, list[Place]] = {}
        for places in entries.weights.values():
            place = places.get(naming, {})
            if "of" in place:
                parts.setdefault(str(place["name"]), []).append(place)
        for several in parts.values():
            if len({place["of"] for place in several}) > 1 and len(several) == 3:
                several.sort(key=lambda place: float(place["part"]) / float(place["of"]))
                for place, word in zip(several, ("query", "key", "value"), strict=True):
                    del place["part"], place["of"]
                    place["qkv"] = word


def _holes(shape: str) -> list[str]:
    """A hole for each number of a template; `{e}` for that of an expert."""
    words = shape.split(".")
    before = [words[at - 1] for at, word in enumerate(words) if word == "#"]
    free = iter(HOLES)
    return ["{e}" if name == "experts" else next(free) for name in before]


def _matched(shape: str, holes: list[str], cases: list[tuple[list[str], list[str], Piece]]) -> tuple[list[str], bool]:
    """For each number of the other side the hole that has the same number in every case, or the number itself.

    The second value says whether experts are counted on from those of another weight, which has as many.
    """
    found: list[str] = []
    half = False
    for at in range(shape.split(".").count("#")):
        there = [other[at] for _, other, _ in cases]
        same = [hole for i, hole in enumerate(holes) if [own[i] for own, _, _ in cases] == there and hole not in found]
        if same:
            found.append(same[0])
        elif [str(piece.expert) for _, _, piece in cases] == there:
            found.append("{e}")
        elif len(set(there)) == 1:
            found.append(there[0])
        elif {int(number) - (piece.expert or 0) for number, (_, _, piece) in zip(there, cases, strict=True)} == {
            len({piece.expert for _, _, piece in cases})
        }:
            found.append("{e}")
            half = True
        else:
            raise ValueError(f"{shape}: number {at} follows no number of the other name")
    return found, half


def _template(path: str) -> str:
    return _fill(_shape(path), _holes(_shape(path)))


def _fill(shape: str, holes: Iterable[str]) -> str:
    given = iter(holes)
    return ".".join(next(given) if word == "#" else word for word in shape.split("."))


def _shape(name: str) -> str:
    words = name.split(".")
    return ".".join("#" if _counts(words, at) else word for at, word in enumerate(words))


def _numbers(name: str) -> list[str]:
    words = name.split(".")
    return [word for at, word in enumerate(words) if _counts(words, at)]


def _counts(words: list[str], at: int) -> bool:
    """Whether a word is a number of many alike: T5's blocks have an attention as `layer.0`, a network as `layer.1`."""
    return words[at].isdigit() and not (at >= 3 and words[at - 1] == "layer" and words[at - 3] == "block")
