"""Fingerprints: a short name for the values of a base's weights, cheap enough for every merge.

Names, shapes, dtypes and a sample of each tensor's bytes are hashed, so that two models of one architecture that were
trained apart never agree, whatever their files are called and however they are cut into shards. A base in which a few
elements were edited by hand may have the fingerprint of the original: the whole content is hashed only where all
tensors are small.
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

PREFIX = "sampled-sha256:"

SAMPLE = 4 << 20
"""Bytes read in all, about: reading and hashing so many in blocks takes some 50 ms."""

LEAST, MOST = 64, 64 << 10
"""Bytes read of one tensor."""

BLOCKS = 16
"""Places at which a tensor is read that is larger than its share of the sample."""


def fingerprint(base: Checkpoint) -> str:
    """The fingerprint of a base's weights as they are stored.

    Raises:
        StorageError: a file cannot be read.
    """
    share = min(max(SAMPLE // max(len(base.tensors), 1), LEAST), MOST)
    digest = hashlib.sha256()
    with files_kept_open():
        for name in sorted(base.tensors):
            tensor = base.tensors[name]
            digest.update(f"{name}\0{tensor.dtype.name}\0{list(tensor.shape)}\0".encode())
            if tensor.span is None and tensor.part is None:
                # Bytes that are not one run of a file: each read would make all of them.
                whole = bytes(tensor.fetch())
                tensor = replace(tensor, part=partial(_part, whole, tensor.dtype.itemsize))
            for start, count in _places(tensor, share):
                digest.update(bytes(tensor.read(start, count)))
    return PREFIX + digest.hexdigest()


def _part(whole: bytes, size: int, first: int, count: int) -> bytes:
    return whole[first * size : (first + count) * size]


def _places(tensor: Lazy, share: int) -> list[tuple[int, int]]:
    """(first element, how many) of each run that is read, evenly spaced from the first element to the last."""
    elements, size = math.prod(tensor.shape), max(tensor.dtype.itemsize, 1)
    if elements * size <= share:
        return [(0, elements)] if elements else []
    count = max(share // size // BLOCKS, 1)
    last = elements - count
    return [(last * block // (BLOCKS - 1), count) for block in range(BLOCKS)]
