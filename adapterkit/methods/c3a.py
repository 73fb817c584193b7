"""C3A: W' = W + D, where D consists of circulant blocks.  Chen et al. 2024, https://arxiv.org/abs/2407.19342

Element (i, j) of block (m, n) is kernel[m, n, (j - i) mod b] / in, where `in` is the number of inputs of W. So D acts
as a block-circular convolution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import Additive, tensor
from ..io.computed import times
from ..linalg.positions import counting

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class C3A(Additive):
    """W'[m * b + i, n * b + j] = W[m * b + i, n * b + j] + kernel[m, n, (j - i) mod b] / in."""

    linear_only = True
    paper = "https://arxiv.org/abs/2407.19342"

    kernel: Tensor = tensor("out/b in/b b")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        common = math.gcd(*W.shape)
        size = max(n for n in range(1, min(rank, common) + 1) if common % n == 0)
        return cls.from_fields(**{"kernel": W.new_zeros(W.shape[0] // size, W.shape[1] // size, size), **attributes})

    def scaled(self, weight: float) -> Self | None:
        return self.replace(kernel=times(self.kernel, weight))

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        at = counting(self.kernel.shape[2], self.kernel)
        blocks = self.kernel[:, :, (at[None, :] - at[:, None]) % len(at)]
        return blocks.swapaxes(1, 2).reshape(shape) / shape[1]

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        return math.sqrt(self.kernel.shape[2] * float((self.kernel * self.kernel).sum())) / shape[1]
