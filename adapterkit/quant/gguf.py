"""GGUF: models as llama.cpp has them; a weight is one tensor of ggml's blocks, in the file's own names and row order.

Merged, a file becomes a file: key-values and every tensor that no adapter touches keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ..errors import TargetNotFound, Unsupported, UsageError
from ..naming.experts import Experts
from ..naming.gguf import ARCHITECTURES
from ..naming.heads import rope_pairs
from ..naming.tables import Names, Table
from ..tensors.dtypes import DTYPES
from ..tensors.ggml_blocks import BLOCKS, decoded, encoded
from ..tensors.gguf import PLAIN, Model, raw_size, read_model
from ..tensors.lazy import Lazy
from ..tensors.marks import is_gguf
from ._scheme import Packed, Scheme, numbers, steps

if TYPE_CHECKING:
    import numpy as np

    from ..tensors.checkpoint import Checkpoint
    from ..tensors.lazy import Buffer
    from . import Dequantized
    from ._scheme import Array, Merged

FLOATS = tuple(name for name in PLAIN.values() if DTYPES[name].floating)
SHIFTED = ("gemma", "gemma2", "gemma3")
"""Architectures whose norms are stored with 1 added."""


class GgufModel(Scheme):
    """One file, or several `-00001-of-0000N.gguf`; `general.architecture` decides on names and row order."""

    url = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"
    description = f"GGUF models: {', '.join(BLOCKS)}; merged into a GGUF file of the same or another type"
    oracle = "gguf-py"

    def detect(self, base: Checkpoint) -> bool:
        return bool(base.files) and all(is_gguf(file) for file in base.files)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        files = [read_model(file) for file in base.files]
        place = _Place(files[0])
        for file in files:
            for name, kind in file.types.items():
                if kind in BLOCKS or kind in FLOATS:
                    yield from _weights(place, name, kind, file, base.tensors[name])


def _weights(place: _Place, name: str, kind: str, file: Model, stored: Lazy) -> Iterator[Packed]:
    """A tensor's weight, or those of the experts that are stacked in it."""
    shape, dtype, experts = file.shapes[name], DTYPES["F32"], place.experts(name, file.shapes[name])
    size = raw_size(kind, shape[1:])
    for number, own in enumerate(experts):
        part = _slice(stored, number * size, size)
        yield _Tensor(own, shape[1:], dtype, (name,), part, kind, kind, 0, file.alignment, len(experts))
    if not experts:
        own, period = place.of(name, shape)
        yield _Tensor(own, shape, dtype, (name,), stored, kind, kind, period, file.alignment)


def _slice(stored: Lazy, offset: int, size: int) -> Lazy:
    def part(first: int, count: int) -> Buffer:
        return stored.read(offset + first, count)

    return Lazy((size,), stored.dtype, lambda: part(0, size), part=part)


class _Place:
    """The base's own names and heads, out of the key-values."""

    def __init__(self, file: Model) -> None:
        said = {key: value.value for key, value in file.values.items()}
        self.name = str(said.get("general.architecture"))
        if self.name not in ARCHITECTURES or self.name == "gpt2":
            known = ", ".join(name for name in ARCHITECTURES if name != "gpt2")
            cure = f"Known: {known}. Or merge into the weights that it was converted from"
            raise Unsupported(f"GGUF models of architecture {self.name!r}", where="general.architecture", cure=cure)
        heads = said.get(f"{self.name}.attention.head_count")
        self.heads = {"query": heads, "kv": said.get(f"{self.name}.attention.head_count_kv", heads)}
        self.architecture = ARCHITECTURES[self.name]
        self.names = Names(Table(self.architecture.pairs))
        self.stacks = Experts(self.architecture.experts)

    def experts(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The own names of the weights in a stack `[experts, out, in]`; none of another tensor."""
        module, _, leaf = name.rpartition(".")
        found = self.stacks.back(module, shape[0]) if len(shape) == 3 and leaf == "weight" else None
        return [f"{own}.{leaf}" for own in found or ()]

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """(own name, how many rows a head has where they are in Meta's order, or 0); others keep the file's name."""
        module, _, leaf = name.rpartition(".")
        if self.name in SHIFTED and "norm" in module:
            return name, 0
        try:
            own = self.names.back(module)
        except TargetNotFound:
            return name, 0
        parts = module.split(".")
        kind = self.architecture.turned.get(f"blk.{{n}}.{'.'.join(parts[2:])}")
        return f"{own}.{leaf}", 0 if kind is None else self._rows(kind, name, shape[0])

    def _rows(self, kind: str, name: str, rows: int) -> int:
        heads = self.heads[kind]
        if type(heads) is not int or heads <= 0:
            why = f"attention.head_count says {heads!r}, and rows of this tensor are in an order that depends on it"
            raise Unsupported(why, where=name, cure="Merge into the weights that it was converted from")
        rope_pairs(rows, heads, name)
        return rows // heads


@dataclass(frozen=True, eq=False)
class _Tensor(Packed):
    """Rows of blocks; `turned` rows in Meta's order share a head. `kind` is as stored, `new` as it will be written.

    `experts` weights share the member, one behind the other, `stored` being the bytes of this one; 0: it has its own.
    """

    stored: Lazy
    kind: str
    new: str
    turned: int
    alignment: int
    experts: int = 0

    @property
    def merged(self) -> str:
        return self.new if self.new in FLOATS else "F32"

    @property
    def changes(self) -> bool:
        return self.new != self.kind

    @property
    def written(self) -> Lazy:
        """The tensor as it will be written: its size alone."""
        if self.new == self.kind and not self.experts:
            return self.stored
        size = -(-raw_size(self.new, self.shape) * max(self.experts, 1) // self.alignment) * self.alignment
        return Lazy((size,), DTYPES["U8"], bytes)

    @property
    def share(self) -> Lazy | None:
        if not self.experts:
            return None
        size = raw_size(self.new, self.shape)
        return self.stored if self.new == self.kind else Lazy((size,), DTYPES["U8"], bytes)

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed:
        return replace(self, stored=parts.get(self.members[0], self.stored), kind=self.new)

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        if not self.turned or len(self.shape) < 2:
            values = self._read(start, stop)
            return values if not self.turned else self._own(values.reshape(-1, 1)).reshape(values.shape)
        first, end = start // self.turned * self.turned, -(-stop // self.turned) * self.turned
        return self._own(self._read(first, end))[start - first :][: stop - start]

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        granule = max(self.turned, 1) if len(self.shape) > 1 else 1
        pieces = [self._encoded(merged(*run)) for run in steps(self.shape, granule)]
        data = b"".join(pieces)
        room = (self.share or self.written).nbytes
        return {self.members[0]: np.frombuffer(data + bytes(room - len(data)), np.uint8)}

    def _encoded(self, values: Array) -> bytes:
        rows = values.reshape(-1, 1) if len(self.shape) < 2 else values
        if self.turned:
            rows = rows.reshape(-1, self.turned, rows.shape[1])[:, rope_pairs(self.turned, 1, self.name)]
        return bytes(rows.tobytes()) if self.new in FLOATS else encoded(self.new, rows)

    def _own(self, rows: Array) -> Array:
        """Rows in the base's own order."""
        import numpy as np

        heads = rows.reshape(-1, self.turned, rows.shape[1])
        own = np.empty_like(heads)
        own[:, rope_pairs(self.turned, 1, self.name)] = heads
        return own.reshape(rows.shape)

    def _read(self, start: int, stop: int) -> Array:
        width = self.shape[-1]
        row = raw_size(self.kind, (width,))
        data = numbers(self.stored, start * row, (stop - start) * row)
        if self.kind in BLOCKS:
            return decoded(self.kind, data).reshape(-1, width)
        return cast("Array", data.view(DTYPES[self.kind].array).astype("f4").reshape(-1, width))


def retyped(base: Dequantized, kind: str) -> Dequantized:
    """The base with every matrix to be written in another type; vectors and routers stay.

    Raises:
        UsageError: no such type.
        Unsupported: rows that are no whole blocks of it.
    """
    kind = {"FLOAT32": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}.get(kind.upper(), kind.upper())
    if kind not in (*BLOCKS, "F32", "F16", "BF16"):
        known = ", ".join((*BLOCKS, "F32", "F16", "BF16"))
        raise UsageError(f"GGUF tensors are not written in {kind!r}", cure=f"Known: {known}")
    packed = {name: _retyped(cast(_Tensor, weight), kind) for name, weight in base.packed.items()}
    return replace(base, packed=packed)


def _retyped(weight: _Tensor, kind: str) -> Packed:
    name = weight.members[0]
    if len(weight.shape) < 2 or "_norm" in name or "ffn_gate_inp" in name:
        return weight
    if kind in BLOCKS and weight.shape[-1] % BLOCKS[kind][1]:
        why = f"rows of {weight.shape[-1]} are no whole blocks of {kind}"
        raise Unsupported(why, where=name, cure="Choose F16, BF16 or F32")
    return replace(weight, new=kind)


def like(base: Dequantized, merged: Checkpoint) -> Dequantized:
    """The base with every tensor in the type that another file of the same tensors has it in."""
    kinds = {name: kind for file in merged.files for name, kind in read_model(file).types.items()}
    packed = {}
    for name, weight in base.packed.items():
        tensor = cast(_Tensor, weight)
        packed[name] = replace(tensor, new=kinds.get(tensor.members[0], tensor.kind))
    return replace(base, packed=packed)


def header(base: Dequantized, file: Any) -> bytes:
    """The header of an output file: the base's own bytes, but for types and offsets that change."""
    kinds = {weight.members[0]: cast(_Tensor, weight).new for weight in base.packed.values()}
    return read_model(file).header(kinds)
