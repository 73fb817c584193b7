"""LoRA: W' = W + scaling * B @ A.  Hu et al. 2021, https://arxiv.org/abs/2106.09685

`scaling` is alpha / r in the paper, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732). In a convolution, A is a convolution with the layer's kernel size, followed by B, a
1x1 convolution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import Additive, of_pair, tensor
from ..linalg.products import product

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class LoRA(Additive):
    """W' = W + scaling * B @ A, b' = b + scaling * bias."""

    blocks = frozenset({"out", "in"})
    paper = "https://arxiv.org/abs/2106.09685"

    A: Tensor = tensor("r in *k")
    B: Tensor = tensor("out r")
    bias: Tensor | None = tensor("out", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A = random((rank, *W.shape[1:])) / math.prod(W.shape[1:]) ** 0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), **attributes)

    @property
    def _rows(self) -> Tensor:
        """A as a matrix `[r, in * k]`, where k is the product of the kernel's sizes."""
        # Do not reshape a matrix: autograd would record an additional operation, and -1 is ambiguous at rank 0.
        return self.A if self.A.ndim == 2 else self.A.reshape(len(self.A), -1)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        return ((self.scaling * self.B) @ self._rows).reshape(shape)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.scaling * self.B, self._rows

    def factors(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, float]:
        return self.B, self._rows, self.scaling

    @property
    def changes_bias(self) -> bool:
        return self.bias is not None

    def bias_delta(self) -> Tensor | None:
        return None if self.bias is None else self.scaling * self.bias

    def delta_into(self, D: Tensor, weight: float) -> None:
        if D.ndim == 2:
            product(D, (weight * self.scaling) * self.B, self._rows)
        else:
            super().delta_into(D, weight)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        A, B = self._rows, self.B
        return abs(self.scaling) * math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y = layer(x) + layer.mix(layer.op(x, self.A), self.B) * self.scaling
        return y if self.bias is None else y + layer.per_channel(self.scaling * self.bias)
