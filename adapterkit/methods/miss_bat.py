"""MiSS's block affine form: W' = W + W @ B + B, block by block.  Kang and Yin 2024, https://arxiv.org/abs/2409.15371

W is split into blocks of r x r. All blocks with the same r outputs share one matrix B[n], which mixes the r inputs of
each block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class MiSSBat(WeightUpdate):
    """W'[n r + i, c r + j] = W[n r + i, c r + j] + sum_k W[n r + i, c r + k] B[n, k, j] + B[n, i, j]."""

    linear_only = True
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="in % r == 0", meaning="the number of inputs is not a multiple of r"),
    )
    paper = "https://arxiv.org/abs/2409.15371"
    since: ClassVar[tuple[str, ...]] = ("1.1",)

    B: Tensor = tensor("out/r r r")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        size = math.gcd(rank, *W.shape)
        return cls.from_fields(B=W.new_zeros(len(W) // size, size, size), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        n, r, _ = self.B.shape
        blocks = W.reshape(n, r, -1, r).swapaxes(1, 2)
        B: Tensor = self.B[:, None]
        changed: Tensor = (blocks + blocks @ B + B).swapaxes(1, 2).reshape(W.shape)
        return changed
