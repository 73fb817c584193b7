"""Read and write llama.cpp's GGUF models. A weight is one tensor of ggml blocks, or is split into two tensors.

A merge writes a new GGUF file with the same key-values. Tensors that no adapter changes keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, cast

from ..errors import Malformed, Unsupported, UsageError
from ..io.ggml_blocks import BLOCKS, decoded, encoded
from ..io.gguf_file import PLAIN, GgufFields, raw_size, read_model
from ..io.inputs import is_gguf
from ..io.lazy import DTYPES, Lazy, Span
from ..naming.architectures import STORED_AS, WEIGHT, fill, of_gguf
from ..naming.gguf import (
    ARCHITECTURE,
    column_order,
    family_of,
    fused_places,
    fused_rows,
    heads_in,
    is_projector,
    place_of,
    row_order,
    rows_apart,
)
from ..naming.image import families_of_model
from . import DAMAGED, Packed, Rowwise, Scheme, numbers, steps

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Buffer
    from ..io.strict_json import JsonValue
    from ..naming.architectures import Architecture, WeightPlace
    from . import Array, Dequantized, Merged


ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""The prefix of keys that contain the original shapes of tensors.

ComfyUI-GGUF reshapes some tensors to rows of 256 values. For each of these tensors, a key with this prefix stores the
original shape.
"""

FLOATS = tuple(name for name in PLAIN.values() if DTYPES[name].floating)


class GgufModel(Scheme):
    """A GGUF model in one file, or in several files named `-00001-of-0000N.gguf`.

    The key `general.architecture` determines the names of the weights and the order of their rows.

    Image and video models from ComfyUI-GGUF and stable-diffusion.cpp have the names and row orders of the original
    safetensors files. stable-diffusion.cpp does not write the architecture.
    """

    url = "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"
    description = f"GGUF models: {', '.join(BLOCKS)}; merged into a GGUF file of the same or another type"
    oracle = "gguf-py"

    def detect(self, base: Checkpoint) -> bool:
        return bool(base.files) and all(is_gguf(file) for file in base.files)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        files = [read_model(file) for file in base.files]
        contents = _Contents(files)
        split, members = contents.split(files, base)
        yield from split
        for file in files:
            for name, kind in file.types.items():
                if (kind in BLOCKS or kind in FLOATS) and name not in members:
                    yield from contents.weights(name, kind, file, base.tensors[name])

    def config(self, base: Checkpoint) -> Mapping[str, JsonValue] | None:
        """Return a config that contains the family's model type, which is needed to resolve the names in adapters."""
        contents = _Contents([read_model(file) for file in base.files])
        if contents.family is None:
            return base.config
        names = {"model_type": contents.model_type, STORED_AS: "gguf", ARCHITECTURE: contents.name}
        return {**(base.config or {}), **names}


def _slice(stored: Lazy, offset: int, size: int) -> Lazy:
    def part(first: int, count: int) -> Buffer:
        return stored.read(offset + first, count)

    span = None if stored.span is None else Span(stored.span.path, stored.span.offset + offset, size)
    return Lazy((size,), stored.dtype, lambda: part(0, size), span, part)


class _Contents:
    """Maps the tensors of a GGUF model to weights. It uses the family's tensor names and the file's key-values.

    Raises:
        Unsupported: the file is an mmproj file. Or no family has the file's architecture, and the file is not a known
            denoiser.
    """

    family: Architecture | None

    def __init__(self, files: Sequence[GgufFields]) -> None:
        self.stated = {key: value.value for key, value in files[0].values.items()}
        if is_projector(self.stated):
            why = "the file is an mmproj file: it has the vision or audio part of a model, but not the language model"
            raise Unsupported(
                why, where=ARCHITECTURE, cure="Merge into the language model's GGUF file instead of the mmproj file"
            )
        self.name = str(self.stated.get(ARCHITECTURE))
        tensors = {name for file in files for name in file.types}
        self.model_type = ""
        if not of_gguf(self.name) and families_of_model(tensors):
            self.family = None
            return
        self.family = family_of(self.name, {_module(name)[0] for name in tensors}, self.stated)
        self.model_type = self.family.record.model_types[0]

    def split(self, files: Sequence[GgufFields], base: Checkpoint) -> tuple[list[GgufSplit], set[str]]:
        """Return the weights that are stored in two tensors, and the names of these tensors."""
        kinds = {name: kind for file in files for name, kind in file.types.items()}
        shapes = {name: shape for file in files for name, shape in file.shapes.items()}
        splits: list[GgufSplit] = []
        for name, kind in kinds.items() if self.family is not None else ():
            assert self.family is not None
            module, leaf = _module(name)
            at = place_of(self.family, module) if leaf == ".weight" else None
            if at is None or at[1].beside is None:
                continue
            other = f"{fill(at[1].beside, at[2])}.weight"
            seen = self.family.place(at[0], WEIGHT)
            if seen is None or not {kind, kinds.get(other)} <= {*BLOCKS, *FLOATS}:
                continue
            pair = (name, other)
            both = shapes[name], shapes[other]
            heads = partial(heads_in, self.stated, self.name, name)
            places, turned, width = rows_apart(at[1], both, heads, name)
            pieces = tuple(
                GgufPiece(
                    each, base.tensors[each], kinds[each], shape if turned and not number else _flat(shape, width),
                    where, turned and not number,
                )
                for number, (each, shape, where) in enumerate(zip(pair, both, places, strict=True))
            )  # fmt: skip
            shape = (sum(map(len, places)), width)
            splits.append(GgufSplit(f"{fill(seen.name, at[2])}.weight", shape, DTYPES["F32"], pair, pieces))
        return splits, {member for weight in splits for member in weight.members}

    def weights(self, name: str, kind: str, file: GgufFields, stored: Lazy) -> Iterator[Packed]:
        """Yield the weight in a tensor, or one weight per expert if the tensor is a stack.

        The weights have the family's names. A tensor that the family does not list keeps its GGUF name, so no adapter's
        target matches it. Denoisers have no family. Their tensors keep the names in the file, which are the names of
        the original safetensors file.
        """
        shape, dtype = file.shapes[name], DTYPES["F32"]
        module, leaf = _module(name)
        if self.family is None:
            yield self._as_it_is(name, kind, file, stored)
            return
        gguf_place = place_of(self.family, module) if leaf else None
        if gguf_place is None and leaf and (parts := fused_places(self.family, module)):
            yield from self._fused(name, kind, file, stored, parts)
            return
        # Keep the tensor under its GGUF name in two cases: the family does not list it, or it is one of the two tensors
        # of a split weight, and this weight cannot be assembled because one of them is missing or unreadable.
        if gguf_place is None or gguf_place[1].beside is not None:
            yield _Tensor(name, shape, dtype, (name,), stored, kind, kind, None, file.alignment)
            return
        key, place, numbers = gguf_place
        seen = self.family.place(key, WEIGHT)
        assert seen is not None
        if place.stacked:
            size, rows = raw_size(kind, shape[1:]), math.prod(shape[:-1])
            for expert in range(shape[0]):
                expert_name = f"{fill(seen.name, {**numbers, '{e}': str(expert)})}{leaf}"
                part = _slice(stored, expert * size, size)
                yield _Tensor(expert_name, shape[1:], dtype, (name,), part, kind, kind, None, file.alignment, rows)
            return
        order = columns = None
        if place.rows is not None:
            order = row_order(place, shape[0], heads_in(self.stated, self.name, name), name)
        if place.columns is not None and len(shape) > 1:
            columns = column_order(place, shape[-1], heads_in(self.stated, self.name, name), name)
        own_shape = (1, *shape) if place.flat and leaf == ".weight" else shape
        yield _Tensor(
            f"{fill(seen.name, numbers)}{leaf}", own_shape, dtype, (name,), stored, kind, kind, order, file.alignment,
            columns=columns,
        )  # fmt: skip

    def _as_it_is(self, name: str, kind: str, file: GgufFields, stored: Lazy) -> Packed:
        """Return a denoiser's tensor under its own name, in its shape before the conversion to GGUF."""
        shape, dtype = file.shapes[name], DTYPES["F32"]
        stated_shape = self.stated.get(ORIGINAL_SHAPE + name)
        original = (
            tuple(stated_shape)
            if isinstance(stated_shape, list) and all(type(size) is int for size in stated_shape)
            else shape
        )
        tensor = _Tensor(name, shape, dtype, (name,), stored, kind, kind, None, file.alignment)
        if original == shape:
            return tensor
        if math.prod(original) != math.prod(shape) or any(size < 1 for size in original):
            why = f"the shape before conversion, {list(original)}, does not fit the stored shape {list(shape)}"
            raise Malformed(why, where=name, cure=DAMAGED)
        return _Reshaped(name, original, dtype, (name,), tensor)

    def _fused(
        self,
        name: str,
        kind: str,
        file: GgufFields,
        stored: Lazy,
        parts: Sequence[tuple[str, WeightPlace, dict[str, str]]],
    ) -> Iterator[Packed]:
        """Yield the weights that the converter joined into one tensor, in the order of their rows."""
        shape, (module, leaf) = file.shapes[name], _module(name)
        assert self.family is not None
        stacked = parts[0][1].stacked
        experts, shape_of_one = (shape[0], shape[1:]) if stacked else (1, shape)
        sizes, total, at = fused_rows(module, shape_of_one[0], self.stated, self.name), experts * shape_of_one[0], 0
        for expert in range(experts):
            for (key, place, numbered), rows in zip(parts, sizes, strict=True):
                seen, form = self.family.place(key, WEIGHT), (rows, *shape_of_one[1:])
                assert seen is not None
                path = fill(seen.name, {**numbered, "{e}": str(expert)})
                order = None
                if place.rows is not None:
                    order = row_order(place, rows, heads_in(self.stated, self.name, name), name)
                size = raw_size(kind, form)
                part = _slice(stored, at, size)
                yield _Tensor(
                    f"{path}{leaf}", form, DTYPES["F32"], (name,), part, kind, kind, order, file.alignment, total
                )
                at += size


def _flat(shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Return the shape of a stack of matrices, viewed as one matrix with the rows of all matrices."""
    return (math.prod(shape) // width, width)


def _module(name: str) -> tuple[str, str]:
    """Split a tensor's name into (module, `.weight` or `.bias`); the second part is empty for other names."""
    module, dot, leaf = name.rpartition(".")
    return (module, dot + leaf) if leaf in ("weight", "bias") else (name, "")


@dataclass(frozen=True, eq=False)
class _Tensor(Rowwise):
    """A weight stored as rows of ggml blocks. `kind` is the stored type, and `new` is the type to write.

    Row i of the tensor is row `order[i]` of the weight, and column i is column `columns[i]` of the weight. If the
    tensor contains several weights, one after the other, `stored` contains only this weight's bytes, and `shared` is
    the number of rows of the whole tensor. Otherwise `shared` is 0.
    """

    stored: Lazy
    kind: str
    new: str
    order: Array | None
    alignment: int
    shared: int = 0
    columns: Array | None = None

    @property
    def merged(self) -> str:
        return self.new if self.new in FLOATS else "F32"

    @property
    def changes(self) -> bool:
        return self.new != self.kind

    @property
    def written(self) -> Lazy:
        """The tensor that will be written. If its bytes will change, this is a placeholder with the right size."""
        if self.new == self.kind and not self.shared:
            return self.stored
        shape = (self.shared, *self.shape[-1:][: len(self.shape) - 1]) if self.shared else self.shape
        size = -(-raw_size(self.new, shape) // self.alignment) * self.alignment
        return Lazy((size,), DTYPES["U8"], bytes)

    @property
    def share(self) -> Lazy | None:
        if not self.shared:
            return None
        size = raw_size(self.new, self.shape)
        return self.stored if self.new == self.kind else Lazy((size,), DTYPES["U8"], bytes)

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed:
        return replace(self, stored=parts.get(self.members[0], self.stored), kind=self.new)

    def rows(self, start: int, stop: int) -> Array:
        if self.order is None:
            return self._read(start, stop)
        if len(self.shape) < 2:
            return self._read(start, stop)[:, self._places]
        wanted = self._places[start:stop]
        first, end = int(wanted.min(initial=0)), int(wanted.max(initial=-1)) + 1
        # One large read is faster than one read per run of rows, if it reads at most four times as many rows as needed.
        if end - first <= 4 * len(wanted):
            return cast("Array", self._read(first, end)[wanted - first])
        return self._scattered(wanted)

    def _scattered(self, wanted: Array) -> Array:
        """Read rows that are far apart, with one read for each run of adjacent rows."""
        import numpy as np

        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        return np.concatenate([self._read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, cuts)])

    @property
    def _places(self) -> Array:
        """Value i is the index of the tensor's row that stores row i of the weight.

        If the weight is a vector, its elements count as rows.
        """
        import numpy as np

        return np.argsort(np.asarray(self.order), kind="stable")

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        data = np.zeros((self.share or self.written).nbytes, np.uint8)
        size = raw_size(self.new, (self.shape[-1],))
        count = math.prod(self.shape[:-1])
        rows = data[: size * count].reshape(count, size)
        places = None if self.order is None or len(self.shape) < 2 else self._places
        for start, stop in steps(self.shape):
            new = np.frombuffer(self._encoded(merged(start, stop)), np.uint8).reshape(-1, size)
            rows[slice(start, stop) if places is None else places[start:stop]] = new
        return {self.members[0]: data}

    @property
    def apart(self) -> bool:
        return len(self.shape) == 2

    def closed(self, row: int) -> bool:
        return self.order is None or not row or int(self.order[:row].max()) < row

    def places(self, row: int) -> dict[str, int]:
        return {self.members[0]: row * raw_size(self.new, self.shape[-1:])}

    def pack_rows(self, start: int, rows: Array) -> dict[str, bytes]:
        reordered = rows if self.order is None else rows[self._within(start, len(rows))]
        return {self.members[0]: self._encoded(reordered)}

    def unpack_rows(self, start: int, parts: Mapping[str, bytes]) -> Array:
        import numpy as np

        rows = decoded_rows(self.new, self.shape[-1], np.frombuffer(parts[self.members[0]], np.uint8))
        if self.columns is not None:
            rows = rows[:, np.argsort(np.asarray(self.columns), kind="stable")]
        if self.order is None:
            return rows
        restored = np.empty_like(rows)
        restored[self._within(start, len(rows))] = rows
        return restored

    def _within(self, start: int, count: int) -> Array:
        """Return `order` for a run of rows, with indices relative to the first row of the run.

        `order` must map each row of the run to a row of the same run.
        """
        import numpy as np

        return np.asarray(self.order)[start : start + count] - start

    def _encoded(self, values: Array) -> bytes:
        rows = values[:, self.order] if self.order is not None and len(self.shape) < 2 else values
        rows = rows if self.columns is None else rows[:, self.columns]
        return bytes(rows.tobytes()) if self.new in FLOATS else encoded(self.new, rows)

    def _read(self, start: int, stop: int) -> Array:
        import numpy as np

        rows = read_rows(self.stored, self.kind, self.shape[-1], start, stop)
        return rows if self.columns is None else rows[:, np.argsort(np.asarray(self.columns), kind="stable")]


@dataclass(frozen=True, eq=False)
class _Reshaped(Packed):
    """A small convolution weight, stored in rows of 256 values because its own rows do not fill whole blocks."""

    tensor: _Tensor

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed:
        return replace(self, tensor=cast("_Tensor", self.tensor.with_parts(parts)))

    @property
    def merged(self) -> str:
        return self.tensor.merged

    @property
    def changes(self) -> bool:
        return self.tensor.changes

    @property
    def written(self) -> Lazy:
        return self.tensor.written

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        width, stored = self.shape[-1], self.tensor.shape[-1]
        first, last = start * width // stored, -(-stop * width // stored)
        flat = np.ascontiguousarray(self.tensor.rows(first, last)).reshape(-1)
        return cast("Array", flat[start * width - first * stored :][: (stop - start) * width].reshape(-1, width))

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        width, stored = self.shape[-1], self.tensor.shape[-1]

        def rows(start: int, stop: int) -> Array:
            first, last = start * stored // width, -(-stop * stored // width)
            flat = np.ascontiguousarray(merged(first, last)).reshape(-1)
            return cast("Array", flat[start * stored - first * width :][: (stop - start) * stored].reshape(-1, stored))

        return self.tensor.pack(rows)


def retyped(base: Dequantized, kind: str) -> Dequantized:
    """Return the base, configured to write its matrices in the type `kind`.

    These weights keep their types: vectors, norms, routers, and each weight that is split into two tensors.

    Raises:
        UsageError: the type is unknown.
        Unsupported: a matrix's rows do not fill whole blocks of the type.
    """
    kind = {"FLOAT32": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}.get(kind.upper(), kind.upper())
    if kind not in (*BLOCKS, "F32", "F16", "BF16"):
        known = ", ".join((*BLOCKS, "F32", "F16", "BF16"))
        raise UsageError(f"GGUF tensors cannot have the type {kind!r}", cure=f"Known: {known}")
    packed = {name: _retyped(weight, kind) for name, weight in base.packed.items()}
    return replace(base, packed=packed)


def _retyped(weight: Packed, kind: str) -> Packed:
    if isinstance(weight, _Reshaped):
        return replace(weight, tensor=cast("_Tensor", _retyped(weight.tensor, kind)))
    if not isinstance(weight, _Tensor):
        return weight
    name = weight.members[0]
    if len(weight.shape) < 2 or "_norm" in name or "ffn_gate_inp" in name:
        return weight
    if kind in BLOCKS and weight.shape[-1] % BLOCKS[kind][1]:
        why = f"a row has {weight.shape[-1]} elements, which is not a multiple of the block size of {kind}"
        raise Unsupported(why, where=name, cure="Choose F16, BF16 or F32: --dtype F16 (dtype='F16')")
    return replace(weight, new=kind)


def like(base: Dequantized, merged: Checkpoint) -> Dequantized:
    """Return the base, configured to write each tensor in the type that the tensor has in `merged`."""
    kinds = {name: kind for file in merged.files for name, kind in read_model(file).types.items()}
    packed = dict(base.packed)
    for name, weight in base.packed.items():
        tensor = weight.tensor if isinstance(weight, _Reshaped) else weight
        if isinstance(tensor, _Tensor):
            tensor = replace(tensor, new=kinds.get(tensor.members[0], tensor.kind))
            packed[name] = replace(weight, tensor=tensor) if isinstance(weight, _Reshaped) else tensor
    return replace(base, packed=packed)


def header(base: Dequantized, file: str | PathLike[str]) -> bytes:
    """Return the header of an output file: the base's header, with changed types and offsets."""
    tensors = (each.tensor if isinstance(each, _Reshaped) else each for each in base.packed.values())
    kinds = {tensor.members[0]: tensor.new for tensor in tensors if isinstance(tensor, _Tensor)}
    return read_model(file).header(kinds)


# Weights whose rows a GGUF file stores in two tensors, such as DeepSeek's `kv_b_proj` and Qwen3-Next's `in_proj_qkvz`.
#
# Each of the two tensors is written in its stored type; `--dtype` does not change the types.


def read_rows(stored: Lazy, kind: str, width: int, start: int, stop: int) -> Array:
    """Return rows `start` to `stop` of a tensor with ggml's type `kind` as float32 [rows, width]."""
    row = raw_size(kind, (width,))
    return decoded_rows(kind, width, numbers(stored, start * row, (stop - start) * row))


def decoded_rows(kind: str, width: int, data: Array) -> Array:
    """Decode bytes in ggml's type `kind` to rows of `width` float32 values."""
    if kind in BLOCKS:
        return decoded(kind, data).reshape(-1, width)
    return cast("Array", data.view(DTYPES[kind].array).astype("f4").reshape(-1, width))


def write_rows(kind: str, rows: Array) -> bytes:
    """Encode rows in ggml's type `kind`.

    The rows have dtype float32. If `kind` is not a block type, the rows may also have the dtype of `kind`.
    """
    return encoded(kind, rows) if kind in BLOCKS else bytes(rows.astype(DTYPES[kind].array).tobytes())


@dataclass(frozen=True, eq=False)
class GgufPiece:
    """One of the two tensors of a split weight.

    Attributes:
        member: the tensor's name in the file.
        stored: the tensor's bytes, with the padding before the next tensor.
        kind: ggml's type.
        shape: `[rows, width]`, or `[heads, width, rows of a head]` if `turned` is set.
        places: row i of the tensor is row `places[i]` of the weight. If `turned` is set, i counts the rows of all
            heads in sequence, after each head's matrix is transposed back.
        turned: True if the tensor stores the matrix of each head transposed. llama.cpp needs this layout for the keys
            in MLA.
    """

    member: str
    stored: Lazy
    kind: str
    shape: tuple[int, ...]
    places: Array
    turned: bool = False

    def read(self, wanted: Array) -> Array:
        """Return the tensor's rows with the indices `wanted`, as float32 `[rows, width]`.

        `wanted` must be in ascending order.
        """
        import numpy as np

        if not self.turned:
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            return cast("Array", read_rows(self.stored, self.kind, self.shape[-1], first, last)[wanted - first])
        _, width, each = self.shape
        heads = np.arange(wanted[0] // each, wanted[-1] // each + 1)
        whole = [read_rows(self.stored, self.kind, each, head * width, (head + 1) * width).T for head in heads.tolist()]
        return cast("Array", np.concatenate(whole)[wanted - int(heads[0]) * each])

    def pack(self, merged: Merged) -> Array:
        """Return the tensor's new bytes. `merged(start, stop)` returns rows of the merged weight."""
        import numpy as np

        data = bytearray()
        width = self.shape[1] if self.turned else self.shape[-1]
        runs = steps((len(self.places), width))
        if self.turned:
            each = self.shape[2]
            runs = ((start, start + each) for start in range(0, len(self.places), each))
        for start, stop in runs:
            places = self.places[start:stop]
            first, last = int(places.min()), int(places.max()) + 1
            rows = merged(first, last)[places - first]
            data += write_rows(self.kind, np.ascontiguousarray(rows.T if self.turned else rows))
        data += bytes(self.stored.nbytes - len(data))
        return np.frombuffer(data, np.uint8)


@dataclass(frozen=True, eq=False)
class GgufSplit(Packed):
    """A weight that is stored in two tensors, the `pieces`. Each row is in exactly one of them."""

    pieces: tuple[GgufPiece, ...]

    @property
    def merged(self) -> str:
        # Use float32 if a tensor is quantized, or if the two types differ. A narrower dtype would round the values
        # once, and `pack` would round them again.
        (kind, *others) = {piece.kind for piece in self.pieces}
        return "F32" if others or kind in BLOCKS else kind

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed:
        pieces = tuple(replace(piece, stored=parts.get(piece.member, piece.stored)) for piece in self.pieces)
        return replace(self, pieces=pieces)

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        out = np.empty((stop - start, self.shape[-1]), np.float32)
        for piece in self.pieces:
            inside = np.flatnonzero((piece.places >= start) & (piece.places < stop))
            if len(inside):
                out[piece.places[inside] - start] = piece.read(inside)
        return out

    def pack(self, merged: Merged) -> dict[str, Array]:
        return {piece.member: piece.pack(merged) for piece in self.pieces}
