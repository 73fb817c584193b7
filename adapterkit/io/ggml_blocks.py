"""Encode and decode ggml's block types.

Decoding uses the bit layouts and the order of operations of ggml-quants.c, as gguf-py does. So this module, ggml and
gguf-py decode a block to the same float32 values.
Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..native import loops

if TYPE_CHECKING:
    from .lazy import Array, Buffer

BLOCKS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}  # fmt: skip
"""For each block type: ggml's number for the type, the number of elements per block, and the bytes per block."""

NUMBERS = {number: name for name, (number, _, _) in BLOCKS.items()}


def decoded(kind: str, data: Buffer | Array) -> Array:
    """Decode whole blocks to a flat float32 array."""
    import numpy as np

    number, count, size = BLOCKS[kind]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
    if (loaded := loops()) is not None:
        decoded_values = np.empty(len(blocks) * count, np.float32)
        if not loaded.adapterkit_ggml_decode(number, blocks.ctypes.data, len(blocks), decoded_values.ctypes.data, size):
            return decoded_values
    with np.errstate(all="ignore"):
        values = _K[kind](blocks) if kind.endswith("K") else _plain(kind, blocks)
    return np.ascontiguousarray(values, "<f4").reshape(-1)


def encoded(kind: str, values: Array) -> bytes:
    """Encode an array as blocks of type `kind`.

    The number of elements in the array must be a multiple of the number of elements per block.
    """
    import numpy as np

    number, count, size = BLOCKS[kind]
    blocks = np.ascontiguousarray(values, "<f4").reshape(-1, count)
    if (loaded := loops()) is not None:
        blocks_out = np.empty((len(blocks), size), np.uint8)
        if not loaded.adapterkit_ggml_encode(number, blocks.ctypes.data, len(blocks), blocks_out.ctypes.data, size):
            return bytes(blocks_out.data)
    return encoded_by_numpy(kind, blocks)


def encoded_by_numpy(kind: str, blocks: Array) -> bytes:
    """Encode float32 blocks `[n, elements per block]` with numpy; the compiled loops give the same bytes."""
    import numpy as np

    with np.errstate(all="ignore"):
        pieces = k_pieces(kind, blocks) if kind.endswith("K") else _pieces(kind, blocks)
        return bytes(np.concatenate(pieces, axis=1).tobytes())


def _pieces(kind: str, blocks: Array) -> list[Array]:
    """Return the fields of the blocks as bytes, in this order: scale, minimum, fifth bits, quantized values.

    Only `Q4_1` and `Q5_1` have a minimum. Only `Q5_0` and `Q5_1` have fifth bits: the highest bit of each value.
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
        # No call of `floor` is needed, because the conversion to uint8 truncates the values, as in C.
    whole = np.clip(q, 0, (1 << bits) - 1, out=q).astype(np.uint8)
    low = (whole[:, :16] & 15) | (whole[:, 16:] << 4)
    fifth = [np.packbits(whole >> 4, axis=1, bitorder="little")] if bits == 5 else []
    return [_half(scale), *minimum, *fifth, low]


def _largest(blocks: Array) -> Array:
    """Return the value with the largest magnitude in each block. If two values tie, return the first, as ggml does."""
    import numpy as np

    # Use argmax over the magnitudes only for blocks with a tie. For all other blocks, compare the largest and the
    # smallest value, which is twice as fast.
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
    """Unpack small integers from bytes.

    Each group of `run` bytes contains `run * len(shifts)` integers. The first `run` integers are at bit `shifts[0]` of
    the bytes, the next `run` integers at bit `shifts[1]`, and so on.
    """
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

    # The first 32 bytes are a mask with one bit per value. If a value's bit is 0, subtract 4 from the value.
    missing = 1 - _pairs(blocks[:, :32], tuple(range(8)), 32, 1).astype(np.int32)
    q = _pairs(blocks[:, 32:96], (0, 2, 4, 6), 32, 3).astype(np.int32) - 4 * missing
    low, high = _pairs(blocks[:, 96:104], (0, 4), 8, 15), _pairs(blocks[:, 104:108], (0, 2, 4, 6), 4, 3)
    scales = (low | high << 4).astype(np.int32) - 32
    step = _float(blocks[:, 108:110]) * scales.astype("f4")
    return np.asarray(step[..., None] * q.reshape(len(blocks), 16, 16).astype("f4"))


def _q4(blocks: Array) -> Array:
    return _scales_and_minima(blocks, _pairs(blocks[:, 16:], (0, 4), 32, 15))


def _q5(blocks: Array) -> Array:
    high = _pairs(blocks[:, 16:48], tuple(range(8)), 32, 1)
    return _scales_and_minima(blocks, _pairs(blocks[:, 48:], (0, 4), 32, 15) | high << 4)


def _scales_and_minima(blocks: Array, q: Array) -> Array:
    """Decode blocks of Q4_K or Q5_K, whose quantized values `q` are already unpacked.

    A block has eight 6-bit scales and eight 6-bit minima. The bytes of the first four scales also contain the two high
    bits of the last four scales. The bytes of the first four minima also contain the two high bits of the last four
    minima.
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

# Encode ggml's k-quants. A block has 256 values, in runs of 16 or 32 values. Each run has a scale, and the scales are
# quantized too.
#
# The layout is ggml's. For each run, quantize the values with several scales near the scale that maps the run's largest
# value to the end of the quantized range. For each result, fit the scale by least squares, and choose the fitted scale
# with the smallest squared error. Then quantize the chosen scales, and round the values with the quantized scales.
# llama.cpp minimizes a weighted error, so it writes different bytes. Its quantization error is about the same as here.
# Source of the layout: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c


STRETCHES = (-0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
"""The scales to try for a run, given as offsets in quantization steps.

Offset 0 maps the run's largest value to the end of the quantized range. A positive offset maps it beyond the end of the
range, so it is clipped.
"""


def k_pieces(kind: str, blocks: Array) -> list[Array]:
    """Encode float32 blocks `[n, 256]`; return the fields of the blocks as bytes, in the order of the layout."""
    return _FIELDS[kind](blocks)


def _q2_fields(blocks: Array) -> list[Array]:
    x = _columns(blocks, 16)
    scales, least = _with_least(x, 3)
    d, sc = _whole(scales.reshape(-1, 16), 15)
    lower, m = _whole(least.reshape(-1, 16), 15)
    q = _rounded(x + _flat(lower * m), _flat(d * sc), 0, 3)
    return [_bytes(sc) | _bytes(m) << 4, _joined(q, (0, 2, 4, 6), 32), _half(d), _half(lower)]


def _q3_fields(blocks: Array) -> list[Array]:
    x = _columns(blocks, 16)
    d, sc = _signed(_around_zero(x, 4).reshape(-1, 16), 32)
    q, u = _rounded(x, _flat(d * sc), -4, 3), _bytes(sc + 32)
    high, low = _joined(q >> 2, tuple(range(8)), 32), _joined(q & 3, (0, 2, 4, 6), 32)
    return [high, low, _joined(u & 15, (0, 4), 8), _joined(u >> 4, (0, 2, 4, 6), 4), _half(d)]


def _q4_fields(blocks: Array) -> list[Array]:
    head, q = _six_bits(blocks, 15)
    return [*head, _joined(q, (0, 4), 32)]


def _q5_fields(blocks: Array) -> list[Array]:
    head, q = _six_bits(blocks, 31)
    return [*head, _joined(q >> 4, tuple(range(8)), 32), _joined(q & 15, (0, 4), 32)]


def _q6_fields(blocks: Array) -> list[Array]:
    import numpy as np

    x = _columns(blocks, 16)
    d, sc = _signed(_around_zero(x, 32).reshape(-1, 16), 128)
    q = _rounded(x, _flat(d * sc), -32, 31)
    low, high = _joined(q & 15, (0, 4), 64), _joined(q >> 4, (0, 2, 4, 6), 32)
    return [low, high, sc.astype(np.int8).view(np.uint8), _half(d)]


_FIELDS: dict[str, Callable[[Array], list[Array]]] = {
    "Q2_K": _q2_fields,
    "Q3_K": _q3_fields,
    "Q4_K": _q4_fields,
    "Q5_K": _q5_fields,
    "Q6_K": _q6_fields,
}


def _six_bits(blocks: Array, most: int) -> tuple[list[Array], Array]:
    """Encode blocks as Q4_K or Q5_K.

    Return two values: the bytes of the fields that precede the quantized values, and the quantized values.
    """
    import numpy as np

    x = _columns(blocks, 32)
    scales, least = _with_least(x, most)
    d, sc = _whole(scales.reshape(-1, 8), 63)
    lower, m = _whole(least.reshape(-1, 8), 63)
    q = _rounded(x + _flat(lower * m), _flat(d * sc), 0, most)
    s, n = _bytes(sc), _bytes(m)
    a, b = (low[:, :4] | low[:, 4:] >> 4 << 6 for low in (s, n))
    return [_half(d), _half(lower), np.concatenate([a, b, s[:, 4:] & 15 | n[:, 4:] << 4], axis=1)], q


def _columns(blocks: Array, size: int) -> Array:
    """Return the runs as columns `[size, runs]`, so that numpy processes thousands of runs per operation."""
    import numpy as np

    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def _around_zero(x: Array, most: int) -> Array:
    """For each run, return the scale that gives the smallest squared error.

    The quantized values are from `-most` to `most - 1`.
    """
    import numpy as np

    top, bottom = x.max(0), x.min(0)
    largest = np.where(top > -bottom, top, bottom)
    best, scale = np.full(len(largest), -1, "f4"), np.zeros(len(largest), "f4")
    q, product = np.empty_like(x), np.empty_like(x)
    for stretch in STRETCHES:
        np.multiply(x, divided_by(np.float32(-most - stretch), largest), out=q)
        np.clip(np.rint(q, out=q), -most, most - 1, out=q)
        xq, qq = np.multiply(x, q, out=product).sum(0), np.multiply(q, q, out=product).sum(0)
        fitted = divided_by(xq, qq)
        gain = fitted * xq
        # For given q, the best scale has the squared error `sum x^2 - (sum x q)^2 / sum q^2`. So the error is least if
        # the gain `(sum x q)^2 / sum q^2` is largest.
        scale, best = np.where(gain > best, fitted, scale), np.maximum(gain, best)
    return scale


def _with_least(x: Array, most: int) -> tuple[Array, Array]:
    """For each run, return the scale and the negated minimum that give the smallest squared error.

    The quantized values are from 0 to `most`.
    """
    import numpy as np

    size, low, total = np.float32(len(x)), np.minimum(x.min(0), 0), x.sum(0)
    above, q, product = x - low, np.empty_like(x), np.empty_like(x)
    best, scale, least = np.full_like(low, np.inf), np.zeros_like(low), -low
    for stretch in STRETCHES:
        np.multiply(above, divided_by(np.float32(most + stretch), x.max(0) - low), out=q)
        np.clip(np.rint(q, out=q), 0, most, out=q)
        xq, qq = np.multiply(x, q, out=product).sum(0), np.multiply(q, q, out=product).sum(0)
        slope, begin, error = _line(size, total, q.sum(0), xq, qq)
        better = (error < best) & (slope >= 0)
        scale, least, best = (np.where(better, *pair) for pair in ((slope, scale), (begin, least), (error, best)))
    return scale, least


def _line(size: object, total: Array, s: Array, xq: Array, qq: Array) -> tuple[Array, Array, Array]:
    """Fit `x = slope * q - begin` with `begin >= 0` by least squares.

    Return `slope`, `begin`, and the squared error without the constant term `sum x^2`.

    Args:
        size: the number of values x in a run.
        total: the sum of x.
        s: the sum of the quantized values q.
        xq: the sum of x * q.
        qq: the sum of q * q.
    """
    import numpy as np

    slope = divided_by(size * xq - total * s, size * qq - s * s)
    begin = (slope * s - total) / size
    # A block cannot store a positive minimum, so `begin`, the negated minimum, must not be negative. If it is negative,
    # fit a line through zero instead.
    slope, begin = np.where(begin < 0, divided_by(xq, qq), slope), np.maximum(begin, 0)
    return (
        slope,
        begin,
        slope * slope * qq + size * begin * begin - 2 * (slope * xq + slope * begin * s - begin * total),
    )


def _whole(values: Array, most: int) -> tuple[Array, Array]:
    """Quantize non-negative values `[n, values per block]` to integer multiples of a unit; each block has its own unit.

    Return the units `[n, 1]`, and the multiples, which are from 0 to `most`.
    """
    import numpy as np

    unit = _stored(values.max(1, keepdims=True) / np.float32(most))
    return unit, np.clip(np.rint(divided_by(values, unit)), 0, most)


def _signed(values: Array, most: int) -> tuple[Array, Array]:
    """Do the same as `_whole` for values of either sign. The multiples are from `-most` to `most - 1`."""
    import numpy as np

    largest = np.take_along_axis(values, np.abs(values).argmax(1, keepdims=True), 1)
    unit = _stored(largest / np.float32(-most))
    return unit, np.clip(np.rint(divided_by(values, unit)), -most, most - 1)


def _rounded(x: Array, scales: Array, low: int, high: int) -> Array:
    """Quantize each column with its scale. Subtract `low`, and return the integers as bytes `[blocks, 256]`."""
    import numpy as np

    q = np.divide(x, np.where(scales == 0, np.float32(1), scales))
    q *= scales != 0
    np.clip(np.rint(q, out=q), low, high, out=q)
    return np.ascontiguousarray(_bytes(q - np.float32(low)).T).reshape(-1, 256)


def _flat(values: Array) -> Array:
    return values.reshape(-1)


def divided_by(values: object, by: Array) -> Array:
    """Return `values / by`; if an element of `by` is 0, the result there is 0."""
    import numpy as np

    return np.asarray(np.where(by == 0, np.float32(0), values / np.where(by == 0, np.float32(1), by)))


def _joined(q: Array, shifts: Sequence[int], run: int) -> Array:
    """Pack small integers into bytes; this is the inverse of `_pairs`.

    Each group of `run` bytes gets `run * len(shifts)` integers. The first `run` integers go to bit `shifts[0]` of the
    bytes, the next `run` integers to bit `shifts[1]`, and so on.
    """
    import numpy as np

    split = q.reshape(len(q), -1, len(shifts), run) << np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return np.asarray(np.bitwise_or.reduce(split, axis=2).reshape(len(q), -1))


def _bytes(q: Array) -> Array:
    import numpy as np

    return np.asarray(q.astype(np.uint8))


def _stored(values: Array) -> Array:
    return values.astype("<f2").astype("f4")
