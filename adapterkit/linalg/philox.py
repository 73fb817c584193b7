"""Reproducible random numbers: Philox4x32-10, a pure function of a key and a counter.

Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. The generator has no state, so any number can be computed
without the earlier numbers. A sum over many random matrices therefore needs only a few of the matrices in memory at a
time. The functions work with numpy and torch.
"""

from __future__ import annotations

from .namespace import N, namespace, summed

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

CHUNK = 1 << 16
"""How many random values are drawn at a time. Drawing is twice as fast if the values fit in a core's cache."""


def philox(counter: tuple[N, N, N, N], key: tuple[N | int, N | int]) -> tuple[N, N, N, N]:
    """Return four random words for a counter (four words) and a key (two words).

    A word is an int64 array of values below 2^32.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(ROUNDS):
        # The product of two words may set the sign bit, and the right shift copies the sign bit. So mask after the
        # shift.
        one, two = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (two >> 32 & WORD) ^ b ^ k, two & WORD, (one >> 32 & WORD) ^ d ^ m, one & WORD
        k, m = (k + WEYL[0]) & WORD, (m + WEYL[1]) & WORD
    return a, b, c, d


def uniform(seeds: N, stream: int, first: int, stop: int, count: int, dtype: object) -> N:
    """Return vectors `first` to `stop - 1` of each seed, shape `[stop - first, seeds, count]`, with values in [-1, 1).

    Element i of vector n is word i mod 4 of `philox` for the counter (i div 4, n, stream, 0) and the key (seed mod
    2^32, seed div 2^32). A word w becomes the value w / 2^31 - 1, rounded once to the dtype.
    """
    xp = namespace(seeds)
    if seeds.dtype != xp.int64:
        seeds = xp.astype(seeds, xp.int64)
    quarters = (count + 3) // 4
    places = xp.arange(quarters, dtype=xp.int64, device=_device(seeds))
    vectors = xp.arange(first, stop, dtype=xp.int64, device=_device(seeds))[:, None, None]
    key = seeds[None, :, None] & WORD, seeds[None, :, None] >> 32 & WORD
    words = philox((places[None, None], vectors, vectors * 0 + stream, vectors * 0), key)
    drawn = xp.stack([word + 0 * words[0] for word in words], axis=-1)
    flat = xp.reshape(drawn, (stop - first, len(seeds), 4 * quarters))[..., :count]
    # Subtract before the cast to floats, so that the numbers are rounded only once.
    return xp.astype(flat - (1 << 31), dtype) * 2.0**-31


def combine(coefficients: N, seeds: N, stream: int, count: int) -> N:
    """Return `sum_n coefficients[n] * vectors[n]`, shape `[seeds, count]`, in the coefficients' dtype.

    `vectors[n]` contains random vector n of each seed. The vectors are drawn in small groups. To save memory, training
    does not store the vectors for the backward pass, but draws them again.
    """
    n, step = len(coefficients), max(1, CHUNK // max(len(seeds) * count, 1))
    # If there are no coefficients, run the loop once for an empty group of vectors, so that the result is zeros.
    return summed(
        _term(coefficients[first : first + step], seeds, stream, first, count) for first in range(0, max(n, 1), step)
    )


def _term(coefficients: N, seeds: N, stream: int, first: int, count: int) -> N:
    xp = namespace(coefficients)
    wide = xp.float64 if coefficients.dtype == xp.float64 else xp.float32

    def weighed(c: N) -> N:
        vectors = xp.astype(uniform(seeds, stream, first, first + len(c), count, wide), c.dtype)
        return (c @ vectors.reshape((len(c), len(seeds) * count))).reshape((len(seeds), count))

    if not getattr(coefficients, "requires_grad", False):
        return weighed(coefficients)
    from torch.utils.checkpoint import checkpoint

    summed: N = checkpoint(weighed, coefficients, use_reentrant=False)
    return summed


def _device(array: object) -> object:
    from array_api_compat import device

    return device(array)
