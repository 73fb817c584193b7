"""Provide the numbers, names and kernel axes of layers in Keras Hub's backbones, from spec/keras_hub.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..io.inputs import read_input
from .tables import NameTable


class KerasLayer(NamedTuple):
    """A layer of a block.

    Attributes:
        name: its name in Keras Hub, such as `query`.
        offset: its number, counted from the block's own number.
        axes: the axes of its kernel, such as `in heads dim`.
    """

    name: str
    offset: int
    axes: str

    @property
    def shares(self) -> bool:
        """Whether all heads share the layer's B: B has the kernel's last axis, the width of a head."""
        return self.axes.endswith("dim")


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model_types: list[str]
    first: int
    stride: int
    modules: dict[str, tuple[str, int, str]]


@dataclass(frozen=True)
class KerasFamily:
    """The backbones of Keras Hub whose layers have the same order.

    Attributes:
        name: the name in spec/keras_hub.toml.
        record: the entry of the file.
    """

    name: str
    record: _Record

    @cached_property
    def layers(self) -> Mapping[str, KerasLayer]:
        """The layers by our name of the module in a block, such as `self_attn.q_proj`."""
        return {own: KerasLayer(*layer) for own, layer in self.record.modules.items()}

    @cached_property
    def table(self) -> NameTable:
        """A table from our names to the number of the block and the layer's name, as in `{n}.query`."""
        return NameTable({f"model.layers.{{n}}.{own}": f"{{n}}.{layer.name}" for own, layer in self.layers.items()})

    def number(self, block: int, layer: KerasLayer) -> int:
        """Return the number of a layer in files."""
        return self.record.first + self.record.stride * block + layer.offset

    def at(self, number: int) -> tuple[int, str] | None:
        """Return the block and our module name for a number in a file; None if that layer has no LoRA."""
        block, offset = divmod(number - self.record.first, self.record.stride)
        own = next((own for own, layer in self.layers.items() if layer.offset == offset), None)
        return None if own is None or block < 0 else (block, own)


@cache
def families() -> Mapping[str, KerasFamily]:
    """Return the families by transformers' `model_type`."""
    installed = Path(__file__).with_suffix(".toml")
    file = installed if installed.is_file() else Path(__file__).parents[2] / "spec" / "keras_hub.toml"
    records = msgspec.toml.decode(read_input(file), type=dict[str, _Record])
    made = [KerasFamily(name, record) for name, record in records.items()]
    return {kind: family for family in made for kind in family.record.model_types}
