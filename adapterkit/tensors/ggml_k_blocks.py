"""ggml's k-quants, from numbers to bytes: a block of 256 in runs of 16 or 32, whose scales are quantized themselves.

The layout is ggml's; the scales are found by least squares over a few steps around the plain one, each run of its own,
and the numbers are then rounded by the scales as they are stored. llama.cpp searches otherwise, for a weighted error:
its bytes are others, of about the same error. Source of the layout:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

STRETCHES = (-0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
"""How much farther than the largest number of a run the steps reach, in steps."""


def k_pieces(kind: str, blocks: Array) -> list[Array]:
    """The bytes of float32 blocks `[n, 256]`, in the order of their fields."""
    return _K[kind](blocks)


def _q2(blocks: Array) -> list[Array]:
    runs = blocks.reshape(len(blocks), 16, 16)
    scales, least = _with_least(runs, 3)
    d, sc = _whole(scales, 15)
    lower, m = _whole(least, 15)
    q = _rounded(runs + (lower * m)[..., None], d * sc, 0, 3)
    return [_bytes(sc) | _bytes(m) << 4, _joined(q, (0, 2, 4, 6), 32), _half(d), _half(lower)]


def _q3(blocks: Array) -> list[Array]:
    runs = blocks.reshape(len(blocks), 16, 16)
    d, sc = _signed(_around_zero(runs, 4), 32)
    q, u = _rounded(runs, d * sc, -4, 3) + 4, sc + 32
    high, low = _joined(_bytes(q) >> 2, tuple(range(8)), 32), _joined(_bytes(q) & 3, (0, 2, 4, 6), 32)
    return [high, low, _joined(_bytes(u) & 15, (0, 4), 8), _joined(_bytes(u) >> 4, (0, 2, 4, 6), 4), _half(d)]


def _q4(blocks: Array) -> list[Array]:
    head, q = _six_bits(blocks, 15)
    return [*head, _joined(q, (0, 4), 32)]


def _q5(blocks: Array) -> list[Array]:
    head, q = _six_bits(blocks, 31)
    return [*head, _joined(_bytes(q) >> 4, tuple(range(8)), 32), _joined(_bytes(q) & 15, (0, 4), 32)]


def _q6(blocks: Array) -> list[Array]:
    import numpy as np

    runs = blocks.reshape(len(blocks), 16, 16)
    d, sc = _signed(_around_zero(runs, 32), 128)
    q = _bytes(_rounded(runs, d * sc, -32, 31) + 32)
    low, high = _joined(q & 15, (0, 4), 64), _joined(q >> 4, (0, 2, 4, 6), 32)
    return [low, high, sc.astype(np.int8).view(np.uint8), _half(d)]


_K: dict[str, Callable[[Array], list[Array]]] = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}


def _six_bits(blocks: Array, most: int) -> tuple[list[Array], Array]:
    """Scale, least and their eight multiples of six bits; and the numbers, 0 to `most`."""
    import numpy as np

    runs = blocks.reshape(len(blocks), 8, 32)
    scales, least = _with_least(runs, most)
    d, sc = _whole(scales, 63)
    lower, m = _whole(least, 63)
    q = _rounded(runs + (lower * m)[..., None], d * sc, 0, most)
    s, n = _bytes(sc), _bytes(m)
    a, b = (low[:, :4] | low[:, 4:] >> 4 << 6 for low in (s, n))
    return [_half(d), _half(lower), np.concatenate([a, b, s[:, 4:] & 15 | n[:, 4:] << 4], axis=1)], q


def _around_zero(runs: Array, most: int) -> Array:
    """The scale of each run with the least squared error for numbers from -most to most - 1."""
    import numpy as np

    largest = np.take_along_axis(runs, np.abs(runs).argmax(-1, keepdims=True), -1)
    best, scale = np.full(runs.shape[:-1], -1, "f4"), np.zeros(runs.shape[:-1], "f4")
    for stretch in STRETCHES:
        q = np.clip(np.rint(runs * divided_by(np.float32(-most - stretch), largest)), -most, most - 1)
        xq, qq = np.einsum("nrk,nrk->nr", runs, q), np.einsum("nrk,nrk->nr", q, q)
        fitted = divided_by(xq, qq)
        gain = fitted * xq
        scale, best = np.where(gain > best, fitted, scale), np.maximum(gain, best)
    return scale


def _with_least(runs: Array, most: int) -> tuple[Array, Array]:
    """The scale of each run and how far below zero it begins, with the least squared error for numbers 0 to most."""
    import numpy as np

    size = np.float32(runs.shape[-1])
    low = np.minimum(runs.min(-1, keepdims=True), 0)
    span, total = runs.max(-1, keepdims=True) - low, runs.sum(-1)
    best = np.full(total.shape, np.inf, "f4")
    scale, least = np.zeros_like(total), -low[..., 0]
    for stretch in STRETCHES:
        q = np.clip(np.rint((runs - low) * divided_by(np.float32(most + stretch), span)), 0, most)
        xq, qq, s = np.einsum("nrk,nrk->nr", runs, q), np.einsum("nrk,nrk->nr", q, q), q.sum(-1)
        slope = divided_by(size * xq - total * s, size * qq - s * s)
        begin = (slope * s - total) / size
        slope, begin = np.where(begin < 0, divided_by(xq, qq), slope), np.maximum(begin, 0)
        error = slope * slope * qq + size * begin * begin - 2 * (slope * xq + slope * begin * s - begin * total)
        better = (error < best) & (slope >= 0)
        scale, least, best = (
            np.where(better, slope, scale),
            np.where(better, begin, least),
            np.where(better, error, best),
        )
    return scale, least


def _whole(values: Array, most: int) -> tuple[Array, Array]:
    """The unit of a block `[n, 1]`, as it is stored, and the multiples of it that its values, none below 0, are."""
    import numpy as np

    unit = _stored(values.max(1, keepdims=True) / np.float32(most))
    return unit, np.clip(np.rint(divided_by(values, unit)), 0, most)


def _signed(values: Array, most: int) -> tuple[Array, Array]:
    """Likewise for values of either sign: multiples from -most to most - 1."""
    import numpy as np

    largest = np.take_along_axis(values, np.abs(values).argmax(1, keepdims=True), 1)
    unit = _stored(largest / np.float32(-most))
    return unit, np.clip(np.rint(divided_by(values, unit)), -most, most - 1)


def _rounded(runs: Array, scales: Array, low: int, high: int) -> Array:
    import numpy as np

    return np.clip(np.rint(divided_by(runs, scales[..., None])), low, high).reshape(len(runs), -1)


def divided_by(values: Any, by: Array) -> Array:
    """values / by, and 0 where that is 0."""
    import numpy as np

    return np.asarray(np.where(by == 0, np.float32(0), values / np.where(by == 0, np.float32(1), by)))


def _joined(q: Array, shifts: Sequence[int], run: int) -> Array:
    """Numbers in bytes: of each run of bytes, first those at the first shift, then those at the next."""
    import numpy as np

    split = _bytes(q).reshape(len(q), -1, len(shifts), run) << np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return np.asarray(np.bitwise_or.reduce(split, axis=2).reshape(len(q), -1))


def _bytes(q: Array) -> Array:
    import numpy as np

    return np.asarray(q.astype(np.uint8))


def _stored(values: Array) -> Array:
    return values.astype("<f2").astype("f4")


def _half(values: Array) -> Array:
    import numpy as np

    return np.asarray(values.astype("<f2").view(np.uint8))
