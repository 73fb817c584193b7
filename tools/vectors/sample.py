"""One file of a format, byte by byte, and the adapter that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from container import Stored, native, numbers, stored
from layers import Array


@dataclass(frozen=True)
class Wanted:
    """An update that the files say: its tensors as adapterkit has them, of the element type `dtype`."""

    path: str
    tensors: Mapping[str, Array]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    method: str = "lora"
    layout: str = "out *in"
    rows: tuple[int, int] | None = None
    dtype: str = "F32"

    def record(self, tensors: dict[str, Stored]) -> dict[str, Any]:
        """The update's record; its tensors are added to the others."""
        names = {name: f"{self.path}.{self.method}.{len(tensors)}.{name}" for name in self.tensors}
        tensors |= {names[name]: stored(array, self.dtype) for name, array in self.tensors.items()}
        target = {"path": self.path, "layout": self.layout, **({"rows": self.rows} if self.rows else {})}
        attributes = dict(self.attributes)
        return {"target": target, "method": self.method, "version": 1, "tensors": names, "attributes": attributes}


@dataclass(frozen=True)
class Sample:
    """The files by name, in the order of the updates that they hold."""

    files: Mapping[str, bytes]
    wanted: list[Wanted]

    def native(self) -> bytes:
        """The same adapter in adapterkit's own format."""
        tensors: dict[str, Stored] = {}
        updates = [wanted.record(tensors) for wanted in self.wanted]
        return native({"version": "1.0", "updates": updates}, tensors)


def pair(seed: str, out: int, in_: int, rank: int = 2) -> tuple[Array, Array]:
    """A `[rank, in]` and B `[out, rank]`."""
    return numbers(f"{seed}.A", rank, in_), numbers(f"{seed}.B", out, rank)


def f32(array: Array) -> Stored:
    """An array as float32."""
    return stored(np.ascontiguousarray(array), "F32")
