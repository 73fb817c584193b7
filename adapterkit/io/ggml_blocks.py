"""Encode and decode ggml's block types.

Like gguf-py, the formulas follow the bits and the order of operations of ggml-quants.c, so the same bytes give the same
float32 numbers.
Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..native import loops
from .ggml_k_blocks import k_pieces

if TYPE_CHECKING:
    from .lazy import Array, Buffer

BLOCKS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}  # fmt: skip
"""For each type: ggml's number for the type, the elements per block, and the bytes per block."""

NUMBERS = {number: name for name, (number, _, _) in BLOCKS.items()}


def decoded(kind: str, data: Buffer | Array) -> Array:
    """Decode whole blocks to a flat array of float32 numbers."""
    import numpy as np

    number, count, size = BLOCKS[kind]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
    if (loaded := loops()) is not None:
        made = np.empty(len(blocks) * count, np.float32)
        if not loaded.adapterkit_ggml_decode(number, blocks.ctypes.data, len(blocks), made.ctypes.data, size):
            return made
    with np.errstate(all="ignore"):
        values = _K[kind](blocks) if kind.endswith("K") else _plain(kind, blocks)
    return np.ascontiguousarray(values, "<f4").reshape(-1)


def encoded(kind: str, values: Array) -> bytes:
    """Encode an array of numbers as blocks of a type; the count must be a multiple of the block's elements."""
    import numpy as np

    number, count, size = BLOCKS[kind]
    blocks = np.ascontiguousarray(values, "<f4").reshape(-1, count)
    if (loaded := loops()) is not None:
        made = np.empty((len(blocks), size), np.uint8)
        if not loaded.adapterkit_ggml_encode(number, blocks.ctypes.data, len(blocks), made.ctypes.data, size):
            return bytes(made.data)
    return encoded_by_numpy(kind, blocks)


def encoded_by_numpy(kind: str, blocks: Array) -> bytes:
    """Encode float32 blocks `[n, elements per block]` with numpy; the compiled loops give the same bytes."""
    import numpy as np

    with np.errstate(all="ignore"):
        pieces = k_pieces(kind, blocks) if kind.endswith("K") else _pieces(kind, blocks)
        return bytes(np.concatenate(pieces, axis=1).tobytes())


def _pieces(kind: str, blocks: Array) -> list[Array]:
    """Return the fields of a block as bytes, in this order: scale, minimum, fifth bits, quantized numbers.

    Some types have no minimum or no fifth bits.
    """
    import numpy as np

    bits, offset = int(kind[1]), kind.endswith("_1")
    if bits == 8:
        scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        scaled = blocks * _inverse(scale)
        # Emulate C's roundf, which rounds halves away from zero; numpy's rint rounds them to even.
        q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8).view(np.uint8)
        return [_half(scale), q]
    minimum: list[Array] = []
    if offset:
        least = blocks.min(1, keepdims=True)
        minimum = [_half(least)]
        scale = (blocks.max(1, keepdims=True) - least) / np.float32((1 << bits) - 1)
        q = (blocks - least) * _inverse(scale)
        q += np.float32(0.5)
    else:
        scale = _largest(blocks) / np.float32(-(1 << bits - 1))
        q = blocks * _inverse(scale)
        q += np.float32((1 << bits - 1) + 0.5)
        # No floor is needed: the conversion to uint8 truncates, as in C.
    whole = np.clip(q, 0, (1 << bits) - 1, out=q).astype(np.uint8)
    low = (whole[:, :16] & 15) | (whole[:, 16:] << 4)
    fifth = [np.packbits(whole >> 4, axis=1, bitorder="little")] if bits == 5 else []
    return [_half(scale), *minimum, *fifth, low]


def _largest(blocks: Array) -> Array:
    """Return the number of largest magnitude in each block, with its sign; like ggml, the first if two are equal."""
    import numpy as np

    # Use argmax over magnitudes only for blocks with a tie. For all other blocks, comparing the extremes is twice as
    # fast.
    most, least = blocks.max(1, keepdims=True), blocks.min(1, keepdims=True)
    largest = np.where(most > -least, most, least)
    twins = (most == -least)[:, 0]
    largest[twins] = np.take_along_axis(blocks[twins], np.abs(blocks[twins]).argmax(1, keepdims=True), 1)
    return np.asarray(largest)


def _inverse(scale: Array) -> Array:
    import numpy as np

    return np.asarray(np.where(scale == 0, np.float32(0), np.float32(1) / scale))


def _half(values: Array) -> Array:
    import numpy as np

    return np.asarray(values.astype("<f2").view(np.uint8))


def _float(data: Array) -> Array:
    import numpy as np

    return np.asarray(data.copy().view("<f2").astype("f4"))


def _plain(kind: str, blocks: Array) -> Array:
    import numpy as np

    scale, rest = _float(blocks[:, :2]), blocks[:, 2:]
    if kind == "Q8_0":
        return np.asarray(rest.view(np.int8).astype("f4") * scale)
    bits, offset = int(kind[1]), kind.endswith("_1")
    least = _float(rest[:, :2]) if offset else None
    rest = rest[:, 2:] if offset else rest
    low, values = rest[:, 4:] if bits == 5 else rest, np.empty((len(blocks), 32), np.float32)
    values[:, :16], values[:, 16:] = low & 15, low >> 4
    if bits == 5:
        values += np.unpackbits(rest[:, :4], axis=1, bitorder="little") << 4
    if least is None:
        values -= 1 << bits - 1
    values *= scale
    return values if least is None else np.add(values, least, out=values)


def _pairs(data: Array, shifts: tuple[int, ...], run: int, mask: int) -> Array:
    """Unpack integers from bytes: `run` bytes contain `run` integers at bit `shifts[0]`, `run` at `shifts[1]`, etc."""
    import numpy as np

    split = data.reshape(len(data), -1, 1, run) >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return np.asarray((split & np.uint8(mask)).reshape(len(data), -1))


def _q2(blocks: Array) -> Array:
    import numpy as np

    scales, q = blocks[:, :16], _pairs(blocks[:, 16:80], (0, 2, 4, 6), 32, 3).reshape(len(blocks), 16, 16)
    d, least = _float(blocks[:, 80:82]), _float(blocks[:, 82:84])
    step, lower = d * (scales & 15).astype("f4"), least * (scales >> 4).astype("f4")
    return np.asarray(step[..., None] * q.astype("f4") - lower[..., None])


def _q3(blocks: Array) -> Array:
    import numpy as np

    # A set bit of the mask means that 4 is NOT subtracted.
    missing = 1 - _pairs(blocks[:, :32], tuple(range(8)), 32, 1).astype(np.int32)
    q = _pairs(blocks[:, 32:96], (0, 2, 4, 6), 32, 3).astype(np.int32) - 4 * missing
    low, high = _pairs(blocks[:, 96:104], (0, 4), 8, 15), _pairs(blocks[:, 104:108], (0, 2, 4, 6), 4, 3)
    scales = (low | high << 4).astype(np.int32) - 32
    step = _float(blocks[:, 108:110]) * scales.astype("f4")
    return np.asarray(step[..., None] * q.reshape(len(blocks), 16, 16).astype("f4"))


def _q4(blocks: Array) -> Array:
    return _with_least(blocks, _pairs(blocks[:, 16:], (0, 4), 32, 15))


def _q5(blocks: Array) -> Array:
    high = _pairs(blocks[:, 16:48], tuple(range(8)), 32, 1)
    return _with_least(blocks, _pairs(blocks[:, 48:], (0, 4), 32, 15) | high << 4)


def _with_least(blocks: Array, q: Array) -> Array:
    """Decode the scales and minima of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima per block.

    The bytes of the first four scales and minima also contain the two high bits of the last four scales and minima.
    """
    import numpy as np

    a, b, c = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=1)
    least = np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=1)
    step, lower = _float(blocks[:, :2]) * scales.astype("f4"), _float(blocks[:, 2:4]) * least.astype("f4")
    return np.asarray(step[..., None] * q.reshape(len(q), 8, 32).astype("f4") - lower[..., None])


def _q6(blocks: Array) -> Array:
    import numpy as np

    low, high = _pairs(blocks[:, :128], (0, 4), 64, 15), _pairs(blocks[:, 128:192], (0, 2, 4, 6), 32, 3)
    q = (low | high << 4).astype(np.int32) - 32
    step = _float(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype("f4")
    return np.asarray(step[..., None] * q.reshape(len(q), 16, 16).astype("f4"))


_K = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}
