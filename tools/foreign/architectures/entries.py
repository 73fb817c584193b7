"""One model type's entries: canonical weight -> its place in each naming, as templates."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
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
    pieces: dict[tuple[str, int | None], list[tuple[Piece, Piece]]] = {}
    for a, b in pair(ours, theirs):
        own = module_of(a.name)
        if not (a.name.endswith(".bias") and f"{own}.weight" in ours):
            pieces.setdefault((a.name, a.expert), []).append((a, b))
    for several in pieces.values():
        try:
            found = list(_said(several, model.config))
        except ValueError as error:  # A module that the files have no words for; the others are told all the same.
            own = module_of(several[0][0].name)
            print(f"{model_type}: no place in {HUB} for {own}: {error}", file=sys.stderr)
            entries.weights[_template(own)] = {HUB: {"name": ""}}
            continue
        for a, b, order in found:
            own, other = module_of(a.name), module_of(b.name)
            stacks = a.expert is not None, b.expert is not None
            key = (_shape(own), _shape(other), _of(a), _of(b), *stacks, a.transposed, b.transposed, order)
            groups.setdefault(key, []).append((_numbers(own), _numbers(other), a))
    for shape, every in groups.items():
        key, cases = _spelled(shape, every)
        if _one_by_one(key, groups):  # `conv2d1` and `conv2d2` are no number of a hole, as `convs.0` and `convs.1` are.
            for own, other, _ in cases:
                entries.weights[_fill(key[0], own)] = {HUB: {"name": _fill(key[1], other)}}
        elif set(_holes(key[0])) - {"{e}", *_matched(key[1], _holes(key[0]), cases)[0]}:
            print(f"{model_type}: no place in {HUB} for {key[0]}: {key[1]} counts otherwise", file=sys.stderr)
            entries.weights[_fill(key[0], _holes(key[0]))] = {HUB: {"name": ""}}
        else:
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


def _spelled(key: tuple[Any, ...], cases: list[tuple[list[str], list[str], Piece]]) -> tuple[tuple[Any, ...], Any]:
    """A group whose last number of the live name is part of the name: `mlp.layers.0` is stored as `fc1`."""
    words = key[0].split(".")
    fixed = {own[-1] for own, _, _ in cases if own}
    if words[-1] != "#" or len(fixed) > 1 or words.count("#") != key[1].split(".").count("#") + 1:
        return key, cases
    literal = ".".join([*words[:-1], fixed.pop()])
    return (literal, *key[1:]), [(own[:-1], other, piece) for own, other, piece in cases]


def _one_by_one(key: tuple[Any, ...], groups: Mapping[tuple[Any, ...], Any]) -> bool:
    """Whether modules that differ in one number only have names of different forms on the other side."""
    plain = [other[1] for other in groups if other[0] == key[0] and other[2:] == (None, None) + (False,) * 4 + (None,)]
    several = len(plain) > 1 or "#" not in key[1]
    return key[1] in plain and several and key[0].split(".").count("#") == 1


def _said(several: list[tuple[Piece, Piece]], config: Any) -> Iterator[tuple[Piece, Piece, str | None]]:
    """The pieces of one tensor, each with the order of its rows; None where they keep it.

    The order is `interleaved`, or the heads that have the rows in Meta's order.

    Raises:
        ValueError: the rows stand in an order, or in parts, that the files have no words for.
    """
    first, names = several[0][0], {b.name for _, b in several}
    there = np.concatenate([np.arange(b.start, b.stop) for _, b in several])
    size, start = len(there), int(there.min())
    if len(several) > 3 and len(names) == 1:
        yield from (every := list(_every_other(several, there)))
        if every:
            return
    if len(several) <= 3 or len(names) > 1 or any(a.expert is not None or b.expert is not None for a, b in several):
        for a, b in several:
            _of(a), _of(b)
            yield a, b, None
        return
    heads, count = _heads(first.name, config)
    order = np.arange(size).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)  # As `naming.heads.rope_pairs`.
    if size != first.of or size % (2 * count) or not np.array_equal(np.argsort(there - start), order):
        raise ValueError(f"{first.name}: its rows stand in an order of their own")
    other = several[0][1]
    yield (
        Piece(first.name, None, 0, size, size, first.transposed),
        Piece(other.name, None, start, start + size, other.of, other.transposed),
        heads,
    )


def _every_other(several: list[tuple[Piece, Piece]], there: Any) -> Iterator[tuple[Piece, Piece, str]]:
    """A tensor whose halves have every second row of the other one, or that itself has every second one of them."""
    (ours, theirs), size = several[0], len(there)
    halves = np.arange(size).reshape(-1, 2) if size % 2 == 0 else np.zeros(0)
    if np.array_equal(there, halves.T.reshape(-1)):  # Inkling's `w13_weight`.
        for start, stop in ((0, size // 2), (size // 2, size)):
            yield (
                replace(ours, start=start, stop=stop, of=size), replace(theirs, start=start, stop=stop, of=size),
                "interleaved",
            )  # fmt: skip
    elif theirs.of == 2 * size and there[0] < 2 and np.array_equal(there, np.arange(there[0], theirs.of, 2)):
        start = int(there[0]) * size
        yield (
            replace(ours, start=0, stop=size, of=size), replace(theirs, start=start, stop=start + size), "interleaved"
        )  # fmt: skip


def _heads(name: str, config: Any) -> tuple[str, int]:
    """Which heads share the rows of a projection, and how many there are."""
    vision = getattr(config, "vision_config", None)
    if vision is not None and "vision" in name:
        return "vision", int(getattr(vision, "num_attention_heads", 0) or vision.num_heads)
    text = getattr(config, "text_config", config)
    query = int(text.num_attention_heads)
    if name.rpartition(".")[0].endswith("q_proj"):
        return "query", query
    return "kv", int(getattr(text, "num_key_value_heads", query))


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
    own, other, own_part, other_part, own_stacked, other_stacked, own_turned, other_turned, order = key
    holes = _holes(own)
    there, half = _matched(other, holes, cases)
    ours, theirs = _fill(own, holes), _fill(other, there)
    weight = ours
    if own_part is not None or own_stacked:
        parent, _, leaf = ours.rpartition(".")
        if own_part is not None:  # Kimi's convolution of queries, keys and values: `q_conv1d`, `k_conv1d`, `v_conv1d`.
            leaf = LEAVES[own_part[0]] if own_part[1] == 2 else theirs.rpartition(".")[2]
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
        if order == "interleaved" and naming == HUB:
            place["interleaved"] = True
        elif order not in (None, "interleaved") and naming == HUB:
            place |= {"rows": "rope", "heads": order}
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
