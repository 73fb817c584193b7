"""Fingerprints: a short name for the values of a base's weights, cheap enough for every merge.

Names, shapes, dtypes and a sample of each tensor's bytes are hashed, whatever the files are called and however they are
cut into shards. What a change of the weights must be like to be seen:

- any change of a name, a shape or a dtype, and any change of a tensor of at most its share of the sample: always;
- a run of changed elements that is a 63rd of its tensor or longer, an attention head or a block of an MLP for example:
  always, since 64 places are read, evenly spaced from the first element to the last;
- changes scattered over the model, as every training makes them: missed with the probability (1 - p) ** n, for a
  fraction p of changed elements and n elements that are read. Of a model of 10 billion parameters in bfloat16 n is
  about 16 million, so that one changed element in a million is seen but for one case in ten million;
- a few elements, or one row of a large table: seldom. Only the whole content tells those.
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
"""The number tells samplings apart: fingerprints of another one are not compared."""

SAMPLE = 16 << 20
"""Bytes read in all, about: they are read and hashed in some 100 ms, in however many tensors they lie."""

LEAST, MOST = 256, 256 << 10
"""Bytes read of one tensor."""

BLOCKS = 64
"""Places at which a tensor is read that is larger than its share of the sample."""


@files_kept_open()
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
