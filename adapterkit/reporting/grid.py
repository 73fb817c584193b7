"""Rows and columns for pictures: the layer and the module of each target, found from the names alone.

A number in a name counts layers if it differs between targets that are alike otherwise. So `ff.net.0` is part of a
module's name where every layer has a `net.0`, and `layers.0` is a layer where there is a `layers.1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    words = {path: path.split(".") for path in dict.fromkeys(paths)}
    counted = _counted(words.values())
    split = {path: _split(parts, counted) for path, parts in words.items()}
    parents = {_parent(layer) for layer, _ in split.values() if layer}
    columns = _short({module for _, module in split.values()})
    found = {}
    for path, (layer, module) in split.items():
        name = layer.rpartition(".")[2] if len(parents) == 1 and layer else layer
        found[path] = Cell(natural(layer), name, columns[module])
    return found


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


def _is_expert(parts: list[str], at: int) -> bool:
    return at > 0 and parts[at - 1] in EXPERTS


def _counted(names: Iterable[list[str]]) -> set[str]:
    """The words, such as `layers`, behind which a number counts layers."""
    values: dict[tuple[tuple[str, ...], int], set[str]] = {}
    for parts in names:
        shape = tuple("#" if part.isdecimal() else part for part in parts)
        for at, part in enumerate(parts):
            if at and part.isdecimal() and not _is_expert(parts, at):
                values.setdefault((shape, at), set()).add(part)
    several = {shape[at - 1] for (shape, at), numbers in values.items() if len(numbers) > 1}
    # An adapter of a single layer: its first number counts layers, whatever its value.
    return several or {shape[at - 1] for (shape, at) in values if "#" not in shape[:at]}


def _split(parts: list[str], counted: set[str]) -> tuple[str, str]:
    """The path up to the last number that counts layers, and the rest."""
    last = max((at for at in range(1, len(parts)) if parts[at].isdecimal() and parts[at - 1] in counted), default=-1)
    module = ["*" if part.isdecimal() and _is_expert(parts, at) else part for at, part in enumerate(parts)]
    return ".".join(parts[: last + 1]), ".".join(module[last + 1 :])


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
