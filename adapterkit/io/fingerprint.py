"""Fingerprints: a short hash of a base's weights that is cheap enough for every merge.

The hash covers the names, shapes and dtypes of all tensors, and a sample of their bytes. File names and sharding do not
matter. It detects these changes:

- Always: a changed name, shape or dtype, and any change of a tensor that is small enough to be read whole.
- Always: a run of changed elements that is a 63rd of its tensor or longer, e.g. an attention head or an MLP block. The
  reason: 64 places are read, evenly spaced from the first element to the last.
- Almost always: changes scattered over the model, as training makes them. The probability of missing them is
  (1 - p) ** n for a fraction p of changed elements and n elements read. For 10 billion bfloat16 parameters n is about
  16 million, so one changed element in a million is missed in one case of ten million.
- Seldom: a few changed elements, or one row of a large table. Only a hash of all bytes detects those.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .lazy import files_kept_open

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .lazy import Lazy

PREFIX = "sampled-2-sha256:"
"""The number is the version of the sampling; fingerprints of different versions are not compared."""

SAMPLE = 16 << 20
"""Approximate number of bytes read in all. Reading and hashing them takes about 100 ms for any number of tensors."""

LEAST, MOST = 256, 256 << 10
"""Bounds of the bytes read from one tensor."""

BLOCKS = 64
"""Number of places at which a tensor larger than its share of the sample is read."""


@files_kept_open()
def fingerprint(base: Checkpoint) -> str:
    """Return the fingerprint of a base's weights as they are stored.

    Raises:
        StorageError: a file cannot be read.
    """
    share = min(max(SAMPLE // max(len(base.tensors), 1), LEAST), MOST)
    digest = hashlib.sha256()
    with files_kept_open():
        # Sorted by name, so that shards and file order do not matter.
        for name in sorted(base.tensors):
            tensor = base.tensors[name]
            digest.update(f"{name}\0{tensor.dtype.name}\0{list(tensor.shape)}\0".encode())
            if tensor.span is None and tensor.part is None:
                # These bytes are not one run of a file, so each partial read would compute all of them. Do it once.
                whole = bytes(tensor.fetch())
                tensor = replace(tensor, part=partial(_part, whole, tensor.dtype.itemsize))
            for start, count in _places(tensor, share):
                digest.update(bytes(tensor.read(start, count)))
    return PREFIX + digest.hexdigest()


def _part(whole: bytes, size: int, first: int, count: int) -> bytes:
    return whole[first * size : (first + count) * size]


def _places(tensor: Lazy, share: int) -> list[tuple[int, int]]:
    """Return (first element, number of elements) of each run to read, evenly spaced from first to last element."""
    elements, size = math.prod(tensor.shape), max(tensor.dtype.itemsize, 1)
    if elements * size <= share:
        return [(0, elements)] if elements else []
    count = max(share // size // BLOCKS, 1)
    last = elements - count
    return [(last * block // (BLOCKS - 1), count) for block in range(BLOCKS)]
