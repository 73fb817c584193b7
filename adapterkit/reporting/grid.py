"""Rows and columns for pictures: derive the layer and the module of each target from its name alone.

A number in a name is a layer number if it varies between targets whose names are otherwise equal. `layers.0` is a layer
if another target is in `layers.1`. If the only `net` in the names is `net.0`, `net.0` is a part of the module's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

EXPERTS = ("experts", "expert")
"""A number after one of these words is an expert's index. A chart has one column for all experts of a module, because
256 columns would not fit."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A target's row and column in a picture.

    Attributes:
        order: a key that sorts layer 2 before layer 10.
        layer: the name of the row: `11`, or the layer's whole path if layers have different parents. Empty for targets
            outside all layers.
        module: the name of the column, such as `self_attn.q_proj`, with `*` in place of an expert's number.
    """

    order: tuple[str | int, ...]
    layer: str
    module: str

    @property
    def title(self) -> str:
        """The target's name in sentences: `layer 11 q_proj`."""
        if not self.layer:
            return self.module or "the whole model"
        layer = f"layer {self.layer}" if self.layer.isdecimal() else self.layer
        return f"{layer} {self.module}" if self.module else layer


def cells(paths: Iterable[str]) -> dict[str, Cell]:
    """Return the row and column of each target path.

    Args:
        paths: dotted paths of targets, in the names of one model.
    """
    split = {path: tuple(_NUMBER.split(path)) for path in dict.fromkeys(paths)}
    # Group the paths that differ only in their numbers: a large mixture of experts has 45,000 paths, but only a dozen
    # groups.
    numbers: dict[tuple[str, ...], list[set[str]]] = {}
    for parts in split.values():
        values = numbers.setdefault(parts[::2], [set() for _ in parts[1::2]])
        for at, number in enumerate(parts[1::2]):
            values[at].add(number)
    counted = _counted(numbers)
    divisions = {shape: _division(shape, counted) for shape in numbers}
    places = {path: _divided(parts, *divisions[parts[::2]]) for path, parts in split.items()}
    distinct = dict.fromkeys(places.values())
    parents = {layer.rpartition(".")[0] for layer, _ in distinct if layer}
    columns = _short({module for _, module in distinct})
    known = {}
    for layer, module in distinct:
        name = layer.rpartition(".")[2] if len(parents) == 1 and layer else layer
        known[layer, module] = Cell(natural(layer), name, columns[module])
    return {path: known[place] for path, place in places.items()}


def natural(text: str) -> tuple[str | int, ...]:
    """Return a key for sorting names. The key compares the numbers in names by value: 2 before 10."""
    parts = re.split(r"(\d+)", text)
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts))


ORDER = ("qkv", "q", "k", "v", "kv", "o", "out", "attn", "dense", "gate", "w1", "up", "w3", "down", "w2", "fc1", "fc2")
"""Parts of module names, in the order in which a block runs the modules."""


def reading_order(module: str) -> tuple[str | int, ...]:
    """Return a key for sorting modules: queries, keys, values, output, then the feed-forward part."""
    parts = re.split(r"[._]", module.rpartition(".")[2])
    places = [ORDER.index(part) for part in parts if part in ORDER]
    return (min(places, default=len(ORDER)), *natural(module))


_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")
"""Matches a number between dots (or at either end) in a name."""


def _word_before(text: str) -> str:
    """Return the last word of the text before a number: `layers` for `model.layers.`."""
    return text[:-1].rpartition(".")[2]


def _counted(numbers: Mapping[tuple[str, ...], Sequence[set[str]]]) -> set[str]:
    """Return the words, such as `layers`, that come before layer numbers.

    Args:
        numbers: groups of paths that differ only in their numbers. A group's key is the tuple of the texts around the
            numbers. A group's value is a sequence of sets: set i contains all values of the i-th number in the paths.
    """
    places = [
        (shape, at, values)
        for shape, columns in numbers.items()
        for at, values in enumerate(columns)
        if shape[at]
        and _word_before(shape[at]) not in EXPERTS
        # Skip a number at the end of a path. It is an index in a Sequential: `blocks.3.mlp.0` and `blocks.3.mlp.2` are
        # in the same layer.
        and not (at > 0 and shape[at + 1] == "")
    ]
    several = {_word_before(shape[at]) for shape, at, values in places if len(values) > 1}
    # If no number varies, the adapter has a single layer: the first number in each name is the layer number.
    return several or {_word_before(shape[at]) for shape, at, _ in places if at == 0}


def _division(shape: Sequence[str], counted: set[str]) -> tuple[int, list[int]]:
    """Return the index of the part at which the module's name starts, and the indices of the expert numbers.

    The indices count the parts of a path, which are alternately texts and numbers. `shape` contains only the texts.
    """
    words = [_word_before(text) for text in shape[:-1]]
    stop = 2 + 2 * max((at for at, word in enumerate(words) if word and word in counted), default=-1)
    return stop, [2 * at + 1 for at, word in enumerate(words) if word in EXPERTS and 2 * at + 1 >= stop]


def _divided(parts: Sequence[str], stop: int, experts: Sequence[int]) -> tuple[str, str]:
    """Return the layer (the path up to the last layer number) and the module. `*` replaces an expert's number."""
    rest = [*parts]
    for at in experts:
        rest[at] = "*"
    module = "".join(rest[stop:])
    return "".join(parts[:stop]), module.removeprefix(".") if stop else module


def _short(modules: set[str]) -> dict[str, str]:
    """Return a short name for each module.

    It is the last part of the module's name, if this part is unique and not a number. Otherwise it is the whole name.
    """
    shortened = {}
    ends = [module.rpartition(".")[2] for module in modules]
    for module in modules:
        end = module.rpartition(".")[2]
        shortened[module] = end if ends.count(end) == 1 and not end.isdecimal() else module
    return shortened
