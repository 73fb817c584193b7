"""GPTQ, as in AutoGPTQ and GPTQModel: w[out, in] = (q - (zero + 1)) * scale, per group of inputs.

Frantar et al. 2022, arXiv:2210.17323. The older format stores each zero point minus 1. The newer format (`gptq_v2`)
stores the zero point itself, so its formula is w[out, in] = (q - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ShapeMismatch, Unsupported
from ..io.lazy import Lazy
from . import DAMAGED, Packed, Scheme, expect, finite, joined, part_of, settings
from ._conv1d import as_in_base
from ._grouped import BITS, Grouped, unpacked, whole, words

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array


class Gptq(Scheme):
    """A module has `qweight` `[in/n, out]` and `qzeros` `[groups, out/n]`, with n integers per 32-bit word.

    It also has `scales` `[groups, out]`, and optionally `g_idx` `[in]`.
    """

    url = "https://github.com/ModelCloud/GPTQModel"
    description = "GPTQ of 2, 4 or 8 bits, with or without reordered columns"
    oracle = "the published formula"

    def detect(self, base: Checkpoint) -> bool:
        method = settings(base).get("quant_method")
        return method in (None, "gptq") and any(name.endswith(".qweight") for name in base.tensors) and _bits(base) > 0

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if name.endswith(".qweight"):
                yield as_in_base(base, _weight(base, name.removesuffix(".qweight")))


def _bits(base: Checkpoint) -> int:
    """Return the bit width from the config, or 0 if the config has none; the tensors do not show the bit width."""
    bits = settings(base).get("bits")
    return bits if type(bits) is int else 0


def _bits_of_tensors(base: Checkpoint, module: str) -> int:
    """Return the bit width that the shapes of a module's tensors prove.

    With GPTQModel's setting `dynamic`, a module may have a different bit width from the config's `bits`.

    Raises:
        Unsupported: no bit width fits the shapes, or several do.
    """
    shapes = {part: tensor.shape for part in ("qweight", "qzeros", "scales", "g_idx")
              if (tensor := base.tensors.get(f"{module}.{part}")) is not None}  # fmt: skip
    if any(len(shapes.get(part, ())) != 2 for part in ("qweight", "qzeros", "scales")):
        return _bits(base)
    rows, wide, out = shapes["qweight"][0], shapes["qzeros"][1], shapes["scales"][1]
    fitting = [bits for bits in BITS if wide == -(-out * bits // 32)]
    fitting = [bits for bits in fitting if shapes.get("g_idx", (rows * 32 // bits,)) == (rows * 32 // bits,)]
    if len(fitting) != 1:
        fit = f"several bit widths: {fitting}" if fitting else "no known bit width"
        why = f"the config's dynamic sets bit widths for single modules, but the shapes fit {fit}"
        cure = f"Known: {', '.join(map(str, BITS))}. Or merge into the 16-bit weights that the base was quantized from"
        raise Unsupported(why, path=base.root, where=f"{module}.qweight", cure=cure)
    return fitting[0]


@dataclass(frozen=True, eq=False)
class _Columns(Grouped):
    stored: Lazy
    zero: Lazy
    scale: Lazy
    less: int
    size: int
    granule = 32

    def whole(self, start: int, stop: int) -> Array:
        return unpacked(whole(self.stored)[:, start:stop].swapaxes(0, 1).copy(), self.bits)

    def zeros(self, start: int, stop: int) -> Array:
        per = 32 // self.bits
        first = start // per
        stored = whole(self.zero)[:, first : -(-stop // per)].view("u4") + self._ones
        return unpacked(stored, self.bits)[:, start - first * per : stop - first * per].swapaxes(0, 1)

    def scales(self, start: int, stop: int) -> Array:
        return finite(whole(self.scale)[:, start:stop].swapaxes(0, 1), self.members[2])

    @property
    def zero_span(self) -> tuple[int, int]:
        # Zero points stay at `less` or above: in the older format, 0 borrows from the next zero point, and some readers
        # ignore the borrow.
        return self.less, self.span[1]

    @property
    def _ones(self) -> Array:
        """A word in which each field is `less`."""
        import numpy as np

        return np.array(self.less * (0xFFFFFFFF // ((1 << self.bits) - 1)), np.uint32)

    @property
    def group_size(self) -> int:
        return self.size or super().group_size

    def kept(self, scales: Array) -> Array:
        return scales.astype(self.scale.dtype.array).astype("f4")

    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        # GPTQModel subtracts 1 from all zero points of a word at once, and adds it at once when it reads the word.
        stored = (words(zeros.T, self.bits).view("u4") - self._ones).view("i4")
        return words(q, self.bits).T, stored, scales.T.astype(self.scale.dtype.array)

    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        return dict(zip(self.members, joined(pieces, (1, 1, 1)), strict=False))


def _weight(base: Checkpoint, module: str) -> Packed:
    name, bits = f"{module}.weight", _bits(base)
    if settings(base).get("dynamic"):
        bits = _bits_of_tensors(base, module)
    if bits not in BITS:
        raise Unsupported(
            f"the weights have {bits} bits", path=base.root, where=name, cure=f"Known: {', '.join(map(str, BITS))}"
        )
    stored, zero = (part_of(base, name, f"{module}.{part}", ("I32",)) for part in ("qweight", "qzeros"))
    scale = part_of(base, name, f"{module}.scales", ("F16", "BF16", "F32"))
    index = base.tensors.get(f"{module}.g_idx")
    per = 32 // bits
    groups, out = scale.shape if len(scale.shape) == 2 else (0, 0)
    expect(stored.shape, (stored.shape[0], out), f"{module}.qweight")
    expect(zero.shape, (groups, -(-out // per)), f"{module}.qzeros")
    members = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    if index is not None:
        members.append(f"{module}.g_idx")
        part_of(base, name, members[-1], ("I32",))
    less = 0 if settings(base).get("checkpoint_format") == "gptq_v2" else 1
    shape = (out, stored.shape[0] * per)
    stated = settings(base).get("group_size")
    size = stated if type(stated) is int and stated > 0 and -(-shape[1] // stated) == groups else 0
    if index is None and not size and (not groups or shape[1] % groups):
        why = f"{groups} groups do not fit {shape[1]} columns, and the config's group_size is {stated!r}"
        raise ShapeMismatch(why, path=base.root, where=f"{module}.scales", cure=DAMAGED)
    return _Columns(name, shape, scale.dtype, tuple(members), groups, index, bits, stored, zero, scale, less, size)
