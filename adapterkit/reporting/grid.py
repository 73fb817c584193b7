"""Rows and columns for pictures: the layer and the module of each target, found from the names alone.

A number in a name counts layers if it differs between targets that are alike otherwise. So `ff.net.0` is part of a
module's name where every layer has a `net.0`, and `layers.0` is a layer where there is a `layers.1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

EXPERTS = ("experts", "expert")
"""A number behind one of these counts experts, which are summed: a model of 256 of them has no picture otherwise."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A target's place in a picture.

    Attributes:
        order: sorts layers as people count them: 2 before 10.
        layer: the name of the row: `11`, or the whole path where layers have different parents; empty for targets
            that are outside all layers.
        module: the name of the column: `self_attn.q_proj`, with `*` for an expert's number.
    """

    order: tuple[str | int, ...]
    layer: str
    module: str

    @property
    def title(self) -> str:
        """How sentences name the place: `layer 11 q_proj`."""
        if not self.layer:
            return self.module or "the whole model"
        layer = f"layer {self.layer}" if self.layer.isdecimal() else self.layer
        return f"{layer} {self.module}" if self.module else layer


def cells(paths: Iterable[str]) -> dict[str, Cell]:
    """Return the place of each target path.

    Args:
        paths: dotted paths of targets, in the names of one model.
    """
    split = {path: tuple(_NUMBER.split(path)) for path in dict.fromkeys(paths)}
    # A large mixture of experts has 45,000 paths and a dozen shapes, so what follows from a shape is found once.
    numbers: dict[tuple[str, ...], list[set[str]]] = {}
    for parts in split.values():
        values = numbers.setdefault(parts[::2], [set() for _ in parts[1::2]])
        for at, number in enumerate(parts[1::2]):
            values[at].add(number)
    counted = _counted(numbers)
    divisions = {shape: _division(shape, counted) for shape in numbers}
    places = {path: _divided(parts, *divisions[parts[::2]]) for path, parts in split.items()}
    distinct = dict.fromkeys(places.values())
    parents = {_parent(layer) for layer, _ in distinct if layer}
    columns = _short({module for _, module in distinct})
    known = {}
    for layer, module in distinct:
        name = layer.rpartition(".")[2] if len(parents) == 1 and layer else layer
        known[layer, module] = Cell(natural(layer), name, columns[module])
    return {path: known[place] for path, place in places.items()}


def natural(text: str) -> tuple[str | int, ...]:
    """A key that sorts numbers inside of names by value."""
    parts = re.split(r"(\d+)", text)
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts))


ORDER = ("qkv", "q", "k", "v", "kv", "o", "out", "attn", "dense", "gate", "w1", "up", "w3", "down", "w2", "fc1", "fc2")
"""Parts of the names of modules in the order in which a block computes them."""


def reading_order(module: str) -> tuple[str | int, ...]:
    """A key that sorts modules as people read a block: queries, keys, values, output, then the feed-forward part."""
    parts = re.split(r"[._]", module.rpartition(".")[2])
    places = [ORDER.index(part) for part in parts if part in ORDER]
    return (min(places, default=len(ORDER)), *natural(module))


_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")
"""A number that is a word of its own."""


def _word_before(text: str) -> str:
    """The last word of the text before a number: `layers` of `model.layers.`."""
    return text[:-1].rpartition(".")[2]


def _counted(numbers: Mapping[tuple[str, ...], Sequence[set[str]]]) -> set[str]:
    """The words, such as `layers`, behind which a number counts layers.

    Args:
        numbers: the text around the numbers of alike paths -> the values of each number.
    """
    places = [
        (shape, at, values)
        for shape, columns in numbers.items()
        for at, values in enumerate(columns)
        if shape[at]
        and _word_before(shape[at]) not in EXPERTS
        # A number at the end is a place in a sequence: `blocks.3.mlp.0` and `blocks.3.mlp.2` are of one layer.
        and not (at > 0 and shape[at + 1] == "")
    ]
    several = {_word_before(shape[at]) for shape, at, values in places if len(values) > 1}
    # An adapter of a single layer: its first number counts layers, whatever its value.
    return several or {_word_before(shape[at]) for shape, at, _ in places if at == 0}


def _division(shape: Sequence[str], counted: set[str]) -> tuple[int, list[int]]:
    """The place at which paths with this text around their numbers are divided, and the places of experts' numbers.

    Places are those of a path's parts, text and numbers in turn.
    """
    words = [_word_before(text) for text in shape[:-1]]
    stop = 2 + 2 * max((at for at, word in enumerate(words) if word and word in counted), default=-1)
    return stop, [2 * at + 1 for at, word in enumerate(words) if word in EXPERTS and 2 * at + 1 >= stop]


def _divided(parts: Sequence[str], stop: int, experts: Sequence[int]) -> tuple[str, str]:
    """The path up to the last number that counts layers, and the rest with `*` for an expert's number."""
    rest = [*parts]
    for at in experts:
        rest[at] = "*"
    module = "".join(rest[stop:])
    return "".join(parts[:stop]), module.removeprefix(".") if stop else module


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


def _short(modules: set[str]) -> dict[str, str]:
    """The modules by the last part of their names, where that tells them all apart."""
    found = {}
    ends = [module.rpartition(".")[2] for module in modules]
    for module in modules:
        end = module.rpartition(".")[2]
        found[module] = end if ends.count(end) == 1 and not end.isdecimal() else module
    return found
