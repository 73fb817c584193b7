"""HQQ: w = (q - zero) * scale, per group; as in hqq, each operation is rounded to the compute dtype.

Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models. HQQ finds its scales by an
optimization. adapterkit does not implement this optimization, so it reads HQQ weights, but cannot write them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Malformed, Unsupported
from ..io.lazy import BY_TORCH, Lazy
from . import DAMAGED, NO_PACKING, Packed, Scheme, expect, finite, numbers, part_of
from ._grouped import whole

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Array, DType

WORD = ".W_q"
PER = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""The number of values per byte for each bit width; for 3 bits, the number of values per 32-bit word."""
LARGEST_TEXT = 64
STATE = (
    "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip


class Hqq(Scheme):
    """A module's tensors are `W_q`, `scale`, `zero`, and one small tensor per setting, such as `nbits`."""

    url = "https://github.com/mobiusml/hqq"
    description = "HQQ of 8, 4, 3, 2 or 1 bits, groups along either axis; dequantized only"
    oracle = "hqq"

    def detect(self, base: Checkpoint) -> bool:
        return any(name.endswith(WORD) for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if name.endswith(WORD):
                yield _weight(base, name.removesuffix(WORD))


@dataclass(frozen=True, eq=False)
class _Groups(Packed):
    stored: Lazy
    scale: Lazy
    zero: Lazy
    bits: int
    form: tuple[int, int]
    """The shape of q: `[groups, size]`, or `[size, groups]` if the groups lie along axis 0."""

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        # The rows of `form` are consecutive elements of the weight. Unpack only the rows that contain wanted elements.
        first, end, width = start * self.shape[-1], stop * self.shape[-1], self.form[1]
        top, bottom = first // width, -(-end // width)
        zero, scale = (whole(part) for part in (self.zero, self.scale))
        # Groups along axis 1 have one zero and one scale per row of `form`; groups along axis 0 have one row for all.
        if len(zero) > 1:
            zero, scale = zero[top:bottom], scale[top:bottom]
        zero, scale = zero.astype(self.dtype.array), scale.astype(self.dtype.array)
        for part, place in ((zero, 2), (scale, 1)):
            finite(part, self.members[place])
        values: Array = (self._unpacked(top, bottom).astype(self.dtype.array) - zero) * scale
        return np.asarray(values.reshape(-1)[first - top * width :][: end - first].reshape(-1, self.shape[-1]))

    def _unpacked(self, start: int, stop: int) -> Array:
        """Unpack rows of q, which has the shape `form`; the first rows are in the highest bits of the bytes."""
        import numpy as np

        words, per = whole(self.stored), PER[self.bits]
        places, at = np.divmod(np.arange(start, stop), len(words))
        shifts = (self.bits * (per - 1 - places)).astype(words.dtype)
        return np.asarray((words[at] >> shifts[:, None]) & words.dtype.type((1 << self.bits) - 1))


def _weight(base: Checkpoint, module: str) -> Packed:
    name, word = f"{module}.weight", f"{module}{WORD}"
    bits, size, axis = (_number(base, name, f"{module}.{key}") for key in ("nbits", "group_size", "axis"))
    shape_tensor = part_of(base, name, f"{module}.shape", ("I64", "I32"))
    expect(shape_tensor.shape, (2,), f"{module}.shape")
    out, columns = shape = tuple(int(n) for n in numbers(shape_tensor))
    if bits not in PER or axis not in (0, 1) or size <= 0 or out <= 0 or columns <= 0 or out * columns % size:
        why = f"{bits} bits, group size {size} and axis {axis} do not fit a weight of shape {list(shape)}"
        raise Malformed(why, path=base.root, where=word, cure=DAMAGED)
    for key in ("view_as_float", "quant_scale", "quant_zero"):
        if f"{module}.{key}" in base.tensors and bytes(base.tensors[f"{module}.{key}"].read(0, 1)) != b"\0":
            raise Unsupported(f"the weight uses HQQ's setting {key}", path=base.root, where=word, cure=NO_PACKING)
    groups = math.prod(shape) // size
    form, beside = ((groups, size), (groups, 1)) if axis == 1 else ((size, groups), (1, groups))
    stored = part_of(base, name, word, ("I32",) if bits == 3 else ("U8",))
    expect(stored.shape, (-(-form[0] // PER[bits]), form[1]), word)
    scale, zero = (part_of(base, name, f"{module}.{key}", ("F16", "BF16", "F32")) for key in ("scale", "zero"))
    for key, part in (("scale", scale), ("zero", zero)):
        expect(part.shape, beside, f"{module}.{key}")
    first = (word, f"{module}.scale", f"{module}.zero")
    others = (n for key in STATE if (n := f"{module}.{key}") in base.tensors and n not in first)
    return _Groups(name, shape, _dtype(base, name, module), (*first, *others), stored, scale, zero, bits, form)


def _number(base: Checkpoint, name: str, key: str) -> int:
    stored = part_of(base, name, key, ("I32", "I64"))
    expect(stored.shape, (), key)
    return int(numbers(stored)[0])


def _dtype(base: Checkpoint, name: str, module: str) -> DType:
    key = f"{module}.compute_dtype"
    stored = part_of(base, name, key, ("U8",))
    text = bytes(stored.fetch()).decode("latin-1") if stored.nbytes <= LARGEST_TEXT else ""
    dtype = BY_TORCH.get(text.removeprefix("torch."))
    if dtype is None or dtype.name not in ("F16", "BF16", "F32"):
        raise Malformed(f"{text!r} is not a compute dtype", path=base.root, where=key, cure=DAMAGED)
    return dtype
