"""torchao's safetensors layout: integers with w = (q - zero) * scale per group, or 8-bit floats.

A file's metadata contains each tensor's torchao class, in JSON. A weight is stored as `<module>._weight_qdata`,
`_scale` and `_zero_point`. Classes whose layout depends on a kernel (Int4Tensor and its tiled variants) are refused
with an error that names the class. `.bin` files with torchao's classes are also refused, because reading them would
run torchao's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import Malformed, ShapeMismatch, Unsupported
from ..io.lazy import BY_TORCH, Lazy
from ..io.strict_json import load_json
from . import DAMAGED, Packed, Scheme, finite, joined, part_of, rows_of
from ._floats import DTYPES, scaled
from ._grouped import Grouped

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import DType
    from . import Array

KNOWN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
ORIGINAL = f"Known: {', '.join(KNOWN)}. Or merge into the 16-bit weights that the base was quantized from"


class Torchao(Scheme):
    """The metadata has `tensor_names`, and for each tensor `{"_type": class, "_data": {"block_size": ..., ...}}`."""

    url = "https://github.com/pytorch/ao"
    description = f"torchao in safetensors: {', '.join(KNOWN)} (weight-only, per row or per group)"
    oracle = "torchao"

    def detect(self, base: Checkpoint) -> bool:
        return any(True for _ in _records(base))

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name, record in _records(base, packed=True):
            yield _weight(base, name, record)


def _records(base: Checkpoint, packed: bool = False) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield (name, metadata) of every tensor with a torchao class; if `packed`, only of those that the base stores."""
    for path, metadata in base.metadata.items():
        if "tensor_names" not in metadata:
            continue
        for name, text in metadata.items():
            if name == "tensor_names" or '"_type"' not in text:
                continue
            # Check the names first. A repacked weight is found in a base of its tensors alone, and parsing the metadata
            # of all weights for each weight would take quadratic time.
            if packed and f"{_prefix(name)}qdata" not in base.tensors:
                continue
            try:
                record = load_json(text)
            except (ValueError, RecursionError) as error:
                raise Malformed(
                    f"the metadata is not valid JSON ({error})", path=path, where=name, cure=DAMAGED
                ) from None
            if isinstance(record, dict) and record.get("_type") != "Tensor":
                yield name, record


def _prefix(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_"


@dataclass(frozen=True, eq=False)
class _Bytes(Grouped):
    stored: Lazy
    scale: Lazy
    zero: Lazy | None

    def whole(self, start: int, stop: int) -> Array:
        return rows_of(self.stored, start, stop).astype("i4")

    def zeros(self, start: int, stop: int) -> Array | int:
        return 0 if self.zero is None else rows_of(self.zero, start, stop).astype("i4")

    def scales(self, start: int, stop: int) -> Array:
        return finite(rows_of(self.scale, start, stop), self.members[1])

    @property
    def span(self) -> tuple[int, int]:
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def kept(self, scales: Array) -> Array:
        return scales.astype(self.scale.dtype.array).astype("f4")

    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        packed = (q.astype("i1"), scales.astype(self.scale.dtype.array))
        return packed if self.zero is None else (*packed, zeros.astype("i1"))

    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        return dict(zip(self.members, joined(pieces, (0, 0, 0)[: len(pieces[0])]), strict=False))


def _weight(base: Checkpoint, name: str, record: Mapping[str, object]) -> Packed:
    kind, data = str(record.get("_type")), record.get("_data")
    if kind not in KNOWN or not isinstance(data, dict):
        raise Unsupported(f"cannot read a weight of torchao's class {kind}", path=base.root, where=name, cure=ORIGINAL)
    prefix = _prefix(name)
    if f"{prefix}act_pre_scale" in base.tensors or f"{prefix}act_quant_scale" in base.tensors:
        raise Unsupported("the weight is stored with scales for its inputs", path=base.root, where=name, cure=ORIGINAL)
    members = tuple(n for part in ("qdata", "scale", "zero_point") if (n := prefix + part) in base.tensors)
    stored = part_of(base, name, f"{prefix}qdata", DTYPES if kind == "Float8Tensor" else ("I8",))
    part_of(base, name, f"{prefix}scale", ("F32", "BF16", "F16"))
    if kind == "Float8Tensor":
        dtype = _dtype(base, name, data)
        return replace(scaled(base, members[0], members[1], None), name=name, dtype=dtype)
    return _whole(base, name, stored, members, data)


def _whole(base: Checkpoint, name: str, stored: Lazy, members: tuple[str, ...], data: Mapping[str, object]) -> Packed:
    _, of_scale, *of_zero = members
    scale, zero = base.tensors[of_scale], base.tensors[of_zero[0]] if of_zero else None
    block, target = data.get("block_size"), data.get("target_dtype") or {}
    if len(stored.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != stored.shape[0] or 0 in scale.shape:
        why = f"scales of shape {list(scale.shape)} do not fit a weight of shape {list(stored.shape)}"
        raise ShapeMismatch(why, path=base.root, where=of_scale, cure=DAMAGED)
    if block != [1, stored.shape[1] // scale.shape[1]] or stored.shape[1] % scale.shape[1]:
        shapes = f"scales of shape {list(scale.shape)} and a weight of shape {list(stored.shape)}"
        why = f"block_size {block!r} does not fit {shapes}"
        raise ShapeMismatch(why, path=base.root, where=of_scale, cure=DAMAGED)
    if zero is not None and (zero.shape != scale.shape or zero.dtype.name != "I8"):
        why = f"the zero points are {zero.dtype} of shape {list(zero.shape)}, not I8 of shape {list(scale.shape)}"
        raise ShapeMismatch(why, path=base.root, where=of_zero[0], cure=DAMAGED)
    word = str(target.get("_data", "int8")) if isinstance(target, dict) else ""
    bits = int(word[3:]) if word in {f"int{n}" for n in range(1, 9)} else 0
    if not bits:
        why = f"target_dtype {target!r} is not one of int1 to int8"
        raise Unsupported(why, path=base.root, where=name, cure=ORIGINAL)
    dtype = _dtype(base, name, data)
    return _Bytes(name, stored.shape, dtype, members, scale.shape[1], None, bits, stored, scale, zero)


def _dtype(base: Checkpoint, name: str, data: Mapping[str, object]) -> DType:
    dtype_text = data.get("dtype")
    dtype = BY_TORCH.get(str(dtype_text.get("_data"))) if isinstance(dtype_text, dict) else None
    if dtype is None or dtype.name not in ("F16", "BF16", "F32"):
        why = f"dtype {dtype_text!r} is not float16, bfloat16 or float32"
        raise Malformed(why, path=base.root, where=name, cure=DAMAGED)
    return dtype
