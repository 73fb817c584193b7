"""MiSS's block affine form: W' = W + W @ B + B, block by block.  Kang and Yin 2024, https://arxiv.org/abs/2409.15371

W is split into blocks of r x r. All blocks of r outputs share one B, which mixes the r inputs of each of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import WeightUpdate, tensor
from ..errors import ShapeMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class MiSSBat(WeightUpdate):
    """W'[n r + i, c r + j] = W[n r + i, c r + j] + sum_k W[n r + i, c r + k] B[n, k, j] + B[n, i, j]."""

    linear_only = True
    paper = "https://arxiv.org/abs/2409.15371"
    since: ClassVar[tuple[str, ...]] = ("1.1",)

    B: Tensor = tensor("out/r r r")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        size = math.gcd(rank, *W.shape)
        return cls(B=W.new_zeros(len(W) // size, size, size), **attributes)

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        size = self.B.shape[-1]
        if shape[0] % size or shape[1] % size:
            why = f"blocks of {size} x {size} do not make up a weight of {list(shape)}"
            raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")

    def new_weight(self, W: Tensor) -> Tensor:
        n, r, _ = self.B.shape
        blocks = W.reshape(n, r, -1, r).swapaxes(1, 2)
        B: Any = self.B[:, None]
        changed: Tensor = (blocks + blocks @ B + B).swapaxes(1, 2).reshape(W.shape)
        return changed
