"""HiRA: W' = W + W * (B @ A), element by element.  Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS

The change can have full rank although B @ A has low rank. For a convolution, A has the layer's kernel size, as in LoRA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class HiRA(WeightUpdate):
    """W' = W + W * (B @ A)."""

    blocks = frozenset({"out", "in"})
    paper = "https://openreview.net/forum?id=TwJrTz9cRS"

    A: Tensor = tensor("r in *k")
    B: Tensor = tensor("out r")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A = random((rank, *W.shape[1:])) / math.prod(W.shape[1:]) ** 0.5
        return cls.from_fields(A=A, B=W.new_zeros(len(W), rank), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        return W + W * (self.B @ self.A.reshape(len(self.A), -1)).reshape(W.shape)
