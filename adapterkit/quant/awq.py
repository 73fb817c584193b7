"""AWQ in AutoAWQ's GEMM layout: w[out, in] = (q - zero) * scale, per group of inputs.

Lin et al. 2023, arXiv:2306.00978. A 32-bit word contains the values of eight outputs, in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ShapeMismatch, Unsupported
from ..io.lazy import Lazy
from . import DAMAGED, Packed, Scheme, expect, finite, joined, part_of, settings
from ._grouped import Grouped, unpacked, whole, words

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from . import Array

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""`PLACES[i]` is the position of output i in a word of eight outputs."""
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""`ORDER[i]` is the output that is stored at position i of a word."""


class Awq(Scheme):
    """A module's tensors are `qweight` `[in, out/8]`, `qzeros` `[groups, out/8]` and `scales` `[groups, out]`."""

    url = "https://github.com/casper-hansen/AutoAWQ"
    description = "AWQ of 4 bits in the GEMM layout"
    oracle = "the published formula"

    def detect(self, base: Checkpoint) -> bool:
        return settings(base).get("quant_method") == "awq" and any(n.endswith(".qweight") for n in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        config = settings(base)
        bits = config.get("bits", config.get("w_bit", 4))
        # Older files call the layout `version`, and GPTQModel calls it `format`.
        layout = str(config.get("version", config.get("format", "gemm"))).lower()
        if bits != 4 or layout != "gemm":
            raise Unsupported(
                f"the base has AWQ weights with {bits} bits in the layout {layout}",
                path=base.root,
                cure="Use an AWQ base with 4 bits in the layout gemm",
            )
        for name in base.tensors:
            if name.endswith(".qweight"):
                yield _weight(base, name.removesuffix(".qweight"))


@dataclass(frozen=True, eq=False)
class _Words(Grouped):
    stored: Lazy
    zero: Lazy
    scale: Lazy
    granule = 8

    def whole(self, start: int, stop: int) -> Array:
        return _outputs(self.stored, start, stop)

    def zeros(self, start: int, stop: int) -> Array:
        return _outputs(self.zero, start, stop)

    def scales(self, start: int, stop: int) -> Array:
        return finite(whole(self.scale)[:, start:stop].swapaxes(0, 1), self.members[2])

    def kept(self, scales: Array) -> Array:
        return scales.astype(self.scale.dtype.array).astype("f4")

    def parts(self, q: Array, zeros: Array, scales: Array) -> tuple[Array, ...]:
        return _in_words(q), _in_words(zeros), scales.T.astype(self.scale.dtype.array)

    def named(self, pieces: list[tuple[Array, ...]]) -> dict[str, Array]:
        return dict(zip(self.members, joined(pieces, (1, 1, 1)), strict=True))


def _outputs(stored: Lazy, start: int, stop: int) -> Array:
    """Unpack outputs `start` to `stop` from words; return `[outputs, rows of the stored tensor]`."""
    first = start // 8
    words = whole(stored)[:, first : -(-stop // 8)].copy()
    ordered = unpacked(words, 4).reshape(*words.shape, 8)[..., PLACES].reshape(words.shape[0], -1)
    return ordered[:, start - first * 8 : stop - first * 8].swapaxes(0, 1)


def _in_words(numbers: Array) -> Array:
    """Pack integers `[outputs, columns]` into words `[columns, outputs/8]`."""
    eights = numbers.T.reshape(numbers.shape[1], -1, 8)
    return words(eights[..., ORDER].reshape(numbers.shape[1], -1), 4)


def _weight(base: Checkpoint, module: str) -> Packed:
    name = f"{module}.weight"
    stored, zero = (part_of(base, name, f"{module}.{part}", ("I32",)) for part in ("qweight", "qzeros"))
    scale = part_of(base, name, f"{module}.scales", ("F16", "BF16", "F32"))
    groups, out = scale.shape if len(scale.shape) == 2 else (0, 0)
    expect(stored.shape, (stored.shape[0], out // 8), f"{module}.qweight")
    expect(zero.shape, (groups, out // 8), f"{module}.qzeros")
    stated = settings(base).get("group_size", settings(base).get("q_group_size"))
    size = stated if type(stated) is int and stated > 0 and -(-stored.shape[0] // stated) == groups else groups
    if not size or stored.shape[0] % size:
        # AutoAWQ makes no such weight, so it is not known which columns form the smaller group.
        why = f"{groups} groups do not fit {stored.shape[0]} columns, and the config's group_size is {stated!r}"
        raise ShapeMismatch(why, path=base.root, where=f"{module}.scales", cure=DAMAGED)
    members = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    return _Words(name, (out, stored.shape[0]), scale.dtype, members, groups, None, 4, stored, zero, scale)
