"""Decode LoRA on equal blocks of a fused weight, `enable_lora`: only PEFT 0.1 and 0.2 wrote it.

A weight has n equal blocks of outputs, and the enabled blocks are adapted; B has the rows of these blocks in order. The
pair is a grouped convolution: each group of B's rows uses a separate part of A's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import ShapeMismatch
from .factors import PeftFactors
from .file import Found, make

if TYPE_CHECKING:
    from ...io.lazy import Lazy
    from .settings import Settings


def decode(settings: Settings, factors: PeftFactors) -> Iterator[Found]:
    """Yield one LoRA for each run of rows that are adjacent in the weight and belong to one group.

    Raises:
        ShapeMismatch: the tensors do not have these blocks or this rank.
    """
    enabled = [block for block, on in enumerate(settings.enable_lora or ()) if on]
    groups = _groups(settings, factors, len(enabled))
    size, high = factors.B.shape[0] // len(enabled), factors.B.shape[0] // groups
    rank, scaling = factors.B.shape[1], settings.scaling(factors.key.path)
    layout = "in out *k" if settings.fan_in_fan_out else "out *in"
    for start, stop in _runs(factors.B.shape[0], size, high):
        group, to = start // high, enabled[start // size] * size + start % size
        A = _rows(factors.A, group * rank, (group + 1) * rank)
        B = _rows(factors.B.reshape(*factors.B.shape[:2]), start, stop)
        update = make("lora", {"A": A, "B": B}, scaling=scaling)
        yield Found(factors.key.path, update, factors.keys, layout, (to, to + stop - start))


def _groups(settings: Settings, factors: PeftFactors, blocks: int) -> int:
    """Return the number of groups of A and B."""
    (rows, _), (outputs, inner, last) = factors.A.shape, factors.B.shape
    groups = rows // inner if inner else 0
    whole = groups and rows == inner * groups and outputs % groups == 0 and blocks and outputs % blocks == 0
    if not whole or last != 1 or rows != settings.r * blocks:
        raise ShapeMismatch(
            f"B {list(factors.B.shape)} and A {list(factors.A.shape)} do not form {blocks} blocks of rank {settings.r}",
            where=factors.key.text, cure="The config does not belong to this file",
        )  # fmt: skip
    return groups


def _runs(outputs: int, size: int, high: int) -> Iterator[tuple[int, int]]:
    """Split B's rows at the end of each block and of each group."""
    cuts = sorted({*range(0, outputs, size), *range(0, outputs, high), outputs})
    return pairwise(cuts)


def _rows(tensor: Lazy, start: int, stop: int) -> Lazy:
    return tensor.map(lambda values: values[start:stop], (stop - start, *tensor.shape[1:]))
