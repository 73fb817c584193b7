"""compressed-tensors, which llm-compressor writes: integers (packed or not), 8-bit floats, NVFP4 and MXFP4.

w = (q - zero) * scale. A packed integer is stored as q + 2^(bits - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Malformed, ShapeMismatch, Unsupported
from ..io.lazy import Lazy, Shape
from . import (
    DAMAGED,
    E2M1,
    NO_PACKING,
    Packed,
    Scheme,
    expect,
    finite,
    joined,
    nibbles,
    numbers,
    part_of,
    rows_of,
    settings,
    sixteen_bits,
    steps,
)
from ._floats import DTYPES, SCALES, float4, scaled, values_of_scales
from ._grouped import BITS, Grouped, unpacked, whole, words
from .mxfp4 import GROUP, quantized

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from . import Array, Merged

INPUTS = ("input_scale", "input_zero_point")
"""A module's tensors `<module>.<name>` with these names quantize its inputs; an unquantized model has none of them."""

FLOAT4 = ("weight_packed", "weight_scale", "weight_global_scale")


class CompressedTensors(Scheme):
    """A module has `weight_scale`, and `weight` or `weight_packed`.

    It may also have `weight_zero_point`, `weight_shape` and `weight_g_idx`. NVFP4 modules have `weight_global_scale`.
    """

    url = "https://github.com/vllm-project/compressed-tensors"
    description = "compressed-tensors: pack-quantized, int-quantized, float-quantized, nvfp4- and mxfp4-pack-quantized"
    oracle = "compressed-tensors"

    def detect(self, base: Checkpoint) -> bool:
        return settings(base).get("quant_method") == "compressed-tensors" and any(
            name.endswith((".weight_packed", ".weight_scale")) for name in base.tensors
        )

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        if _rotates(settings(base).get("transform_config")):
            why = "layers rotate their inputs or outputs, so an adapter's change does not fit their weights"
            cure = "Merge into the 16-bit weights that the base was quantized from"
            raise Unsupported(why, path=base.root, where="transform_config", cure=cure)
        for name in base.tensors:
            if name.endswith(".weight_scale"):
                yield _weight(base, name.removesuffix(".weight_scale"))


def _rotates(transforms: JsonValue) -> bool:
    """Whether layers rotate their inputs or outputs when the model runs."""
    # Rotations at other locations are parts of the weights, or of the attention.
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    schemes = [scheme for scheme in groups.values() if isinstance(scheme, dict)] if isinstance(groups, dict) else []
    applied = [rotation for scheme in schemes for rotation in _listed(scheme.get("apply"))]
    return any(isinstance(each, dict) and each.get("location") in ("input", "output") for each in applied)


def _listed(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _weight(base: Checkpoint, module: str) -> Packed:
    plain = base.tensors.get(f"{module}.weight")
    if f"{module}.weight_global_scale" in base.tensors:
        return float4(base, module, FLOAT4, divide=True)
    packed = base.tensors.get(f"{module}.weight_packed")
    if packed is not None and packed.dtype.name == "U8":
        return _mxfp4(base, module)
    if packed is not None:
        return _packed(base, module)
    if plain is not None and plain.dtype.name in DTYPES:
        extra = _others(base, module, (*INPUTS, "weight_zero_point"))
        return scaled(base, f"{module}.weight", f"{module}.weight_scale", _block(base, module), extra)
    if plain is not None and plain.dtype.name == "I8":
        # Bytes may store fewer bits, as in W4A8. Programs that pack such bytes later would cut larger values.
        bits = [n for n in _weights(base, "num_bits") if type(n) is int and 2 <= n <= 8]
        return _grouped(base, module, "weight", plain.shape, bits[0] if len(bits) == 1 else 8)
    why = (
        "the module has scales, but neither weight nor weight_packed"
        if plain is None
        else f"the module has scales, but its weight has dtype {plain.dtype}, not I8 or an 8-bit float"
    )
    raise Malformed(why, path=base.root, where=f"{module}.weight_scale", cure=DAMAGED)


@dataclass(frozen=True, eq=False)
class _Whole(Grouped):
    """A weight whose rows are stored as 8-bit integers, or packed into 32-bit words.

    A word contains integers of `bits` bits. Each integer in a word is stored as q + 2^(bits - 1).
    """

    stored: Lazy
    scale: Lazy
    zero: Lazy | None
    packed: bool
    granule = 32

    def whole(self, start: int, stop: int) -> Array:
        import numpy as np

        rows = rows_of(self.stored, start, stop)
        if not self.packed:
            return rows.astype(np.int32)
        return unpacked(rows, self.bits, self.shape[-1]) - (1 << self.bits - 1)

    def zeros(self, start: int, stop: int) -> Array | int:
        import numpy as np

        if self.zero is None:
            return 0
        if self.zero.dtype.name == "I8":
            return self._of(self.zero, start, stop).astype(np.int32)
        per = 32 // self.bits
        first = start // per
        packed = whole(self.zero)[first : -(-stop // per)].swapaxes(0, 1).copy()
        rows = unpacked(packed, self.bits)[:, start - first * per : stop - first * per] - (1 << self.bits - 1)
        return rows.swapaxes(0, 1)

    def scales(self, start: int, stop: int) -> Array:
        return finite(self._of(self.scale, start, stop), self.members[1])

    @property
    def span(self) -> tuple[int, int]:
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def kept(self, scales: Array) -> Array:
        return scales.astype(self.scale.dtype.array).astype("f4")

    def pack(self, merged: Merged) -> dict[str, Array]:
        if self.scale.nbytes == self.scale.dtype.itemsize and self.shape[0] > 1:
            raise Unsupported("adapterkit cannot quantize rows that share one scale", where=self.name, cure=NO_PACKING)
        return super().pack(merged)

    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        import numpy as np

        half = 1 << self.bits - 1
        stored = words(q + half, self.bits) if self.packed else q.astype(np.int8)
        kept = scales.astype(self.scale.dtype.array)
        if self.zero is None:
            return stored, kept
        narrow = self.zero.dtype.name == "I8"
        return stored, kept, zeros.astype(np.int8) if narrow else words(zeros.T + half, self.bits).T

    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        axes = (0, 0, 0)[: len(pieces[0])]
        return dict(zip(self.members, joined(pieces, axes), strict=False))

    def _of(self, stored: Lazy, start: int, stop: int) -> Array:
        """Return rows of a stored tensor of scales or zero points.

        The tensor has either one value per row and group, or a single value. A single value is repeated for each row.
        """
        import numpy as np

        if stored.nbytes == stored.dtype.itemsize:
            return np.broadcast_to(numbers(stored), (stop - start, 1))
        return rows_of(stored, start, stop)


@dataclass(frozen=True, eq=False)
class _Mxfp4(Packed):
    """A weight of 4-bit floats (MXFP4), two in a byte, the first in the low half. 32 values of a row share one scale.

    The byte b means the scale 2^(b - 127).
    """

    stored: Lazy
    scale: Lazy

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        levels = np.array(E2M1, np.float32)[nibbles(rows_of(self.stored, start, stop))]
        scales = values_of_scales(self.scale, start, stop, self.scale.shape[1], self.members[1])
        return np.asarray((levels * np.repeat(scales, GROUP, axis=1)).astype(self.dtype.array))

    def pack(self, merged: Merged) -> dict[str, Array]:
        pieces = [quantized(merged(start, stop).T) for start, stop in steps(self.shape)]
        stored, scale = joined([(blocks.reshape(len(blocks), -1), scales) for blocks, scales in pieces], (0, 0))
        return dict(zip(self.members, (stored, scale), strict=False))


def _mxfp4(base: Checkpoint, module: str) -> Packed:
    name, members = f"{module}.weight", tuple(f"{module}.{part}" for part in FLOAT4[:2])
    stored = part_of(base, name, members[0], ("U8",))
    scale = part_of(base, name, members[1], ("U8", "F8_E8M0"))
    if f"{module}.weight_zero_point" in base.tensors:
        why = "adapterkit cannot read 4-bit floats with zero points"
        cure = "Merge into the 16-bit weights that the base was quantized from"
        raise Unsupported(why, path=base.root, where=f"{module}.weight_zero_point", cure=cure)
    if len(stored.shape) != 2:
        why = f"the tensor has {len(stored.shape)} axes, not 2"
        raise ShapeMismatch(why, path=base.root, where=members[0], cure=DAMAGED)
    shape = (stored.shape[0], stored.shape[1] * 2)
    expect((*scale.shape[:-1], scale.shape[-1] * GROUP) if scale.shape else (), shape, members[1])
    members += _others(base, module, ("input_scale", "input_global_scale"))
    return _Mxfp4(name, shape, sixteen_bits(base), members, stored, scale)


def _packed(base: Checkpoint, module: str) -> Packed:
    name = f"{module}.weight"
    stored = part_of(base, name, f"{module}.weight_packed", ("I32",))
    form = part_of(base, name, f"{module}.weight_shape", ("I64", "I32"))
    expect(form.shape, (2,), f"{module}.weight_shape")
    out, columns = (int(n) for n in numbers(form))
    bits = _bits(base, module, stored.shape[-1] if stored.shape else 0, columns)
    expect(stored.shape, (out, -(-columns * bits // 32)), f"{module}.weight_packed")
    return _grouped(base, module, "weight_packed", (out, columns), bits)


def _grouped(base: Checkpoint, module: str, word: str, shape: Shape, bits: int) -> Packed:
    name, key = f"{module}.weight", f"{module}.weight_scale"
    scale = part_of(base, name, key, SCALES[:3])
    rows = (shape[0], 1) if scale.nbytes == scale.dtype.itemsize else scale.shape
    if len(shape) != 2 or len(rows) != 2 or rows[0] != shape[0] or not 0 < rows[1] <= shape[1]:
        why = f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(shape)}"
        raise ShapeMismatch(why, path=base.root, where=key, cure=DAMAGED)
    zero, index = (base.tensors.get(f"{module}.{part}") for part in ("weight_zero_point", "weight_g_idx"))
    if zero is not None:
        packed = (-(-shape[0] * bits // 32), rows[1])
        expect(zero.shape, packed if zero.dtype.name == "I32" else scale.shape, f"{module}.weight_zero_point")
        part_of(base, name, f"{module}.weight_zero_point", ("I8", "I32"))
    if index is not None:
        part_of(base, name, f"{module}.weight_g_idx", ("I32", "I64"))
    elif shape[1] % rows[1] or not _divides(base, rows[1], shape[1]):
        # compressed-tensors also refuses such a weight, so it is not known which columns form the smaller group.
        why = f"{rows[1]} groups do not fit {shape[1]} columns"
        raise ShapeMismatch(why, path=base.root, where=key, cure=DAMAGED)
    others = _others(base, module, ("weight_zero_point", "weight_g_idx", "weight_shape", *INPUTS))
    members = (f"{module}.{word}", key, *others)
    stored, dtype = base.tensors[members[0]], sixteen_bits(base, scale)
    return _Whole(name, shape, dtype, members, rows[1], index, bits, stored, scale, zero, word != "weight")


def _divides(base: Checkpoint, groups: int, columns: int) -> bool:
    """Whether a group size in the config divides the columns into this number of groups."""
    sizes = [size for size in _weights(base, "group_size") if type(size) is int and size > 0]
    return groups == 1 or not sizes or any(groups * size == columns for size in sizes)


def _others(base: Checkpoint, module: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for word in words if (name := f"{module}.{word}") in base.tensors)


def _weights(base: Checkpoint, key: str) -> list[JsonValue]:
    """Return the different values that the config's groups of layers have for a setting of the weights."""
    groups = settings(base).get("config_groups")
    values_seen: list[JsonValue] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get(key) not in values_seen:
            values_seen.append(weights.get(key))
    return values_seen


def _unproven(base: Checkpoint, module: str, key: str, values_seen: list[JsonValue]) -> Unsupported:
    why = f"layer groups have different values of {key}, and the shapes do not fit exactly one of {values_seen}"
    cure = "Merge into the 16-bit weights that the base was quantized from"
    return Unsupported(why, path=base.root, where=f"{module}.weight", cure=cure)


def _bits(base: Checkpoint, module: str, words: int, columns: int) -> int:
    """Return the number of bits of a packed module, whose rows of `columns` integers are stored in `words` words.

    Groups of layers may have different numbers of bits. The shapes then show the group of the module, because its
    targets in the config can also be classes of modules, which no tensor shows.
    """
    stated = _weights(base, "num_bits")
    wrong = next((bits for bits in stated if bits not in BITS), None) if len(stated) == 1 else None
    if not stated or wrong is not None:
        raise Unsupported(
            f"the weights have {wrong} bits",
            path=base.root,
            where="num_bits",
            cure=f"Known: {', '.join(map(str, BITS))}",
        )
    known = [bits for bits in stated if type(bits) is int and 0 < bits <= 32]
    fitting = [bits for bits in known if -(-columns // (32 // bits)) == words] if len(stated) > 1 else known
    if len(fitting) != 1 or fitting[0] not in BITS:
        raise _unproven(base, module, "num_bits", stated)
    return fitting[0]


def _block(base: Checkpoint, module: str) -> tuple[int, int] | None:
    """Return the size of the blocks of a module's weight that share a scale; None if the config states none.

    Groups of layers may have different blocks. The shapes then show the group of the module.
    """
    stated = _weights(base, "block_structure")
    blocks: list[tuple[int, int]] = []
    for block in stated:
        sizes = [n for n in block if type(n) is int and n > 0] if isinstance(block, list) else []
        if isinstance(block, list) and len(block) == len(sizes) == 2:
            blocks.append((sizes[0], sizes[1]))
    if len(stated) < 2:
        return blocks[0] if blocks else None
    weight, scale = (base.tensors[f"{module}.{part}"].shape for part in ("weight", "weight_scale"))
    grids = {block: tuple(-(-n // size) for n, size in zip(weight[-2:], block, strict=False)) for block in blocks}
    fitting = [block for block, grid in grids.items() if scale[-2:] == grid]
    if len(fitting) > 1:
        raise _unproven(base, module, "block_structure", stated)
    return fitting[0] if fitting else None
