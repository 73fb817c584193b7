"""GLoRA as in LyCORIS: W' = W + scaling * (W @ A1 @ A2 + B1 @ B2).  https://arxiv.org/abs/2309.14859

The original GLoRA (https://arxiv.org/abs/2306.07967) multiplies W elementwise by its support A. Here, W is multiplied
by the low-rank matrix A1 @ A2 along the input axis of W; for a convolution, at every kernel position.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class GLoRAProducts(WeightUpdate):
    """W' = W + scaling * (W @ A1 @ A2 + B1 @ B2)."""

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2309.14859"

    A1: Tensor = tensor("in r")
    A2: Tensor = tensor("r in")
    B1: Tensor = tensor("out r")
    B2: Tensor = tensor("r in *k")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        A1, B1 = (random((n, rank)) / rank**0.5 for n in (W.shape[1], len(W)))
        A2, B2 = W.new_zeros(rank, W.shape[1]), W.new_zeros(rank, *W.shape[1:])
        return cls.from_fields(A1=A1, A2=A2, B1=B1, B2=B2, **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        columns = W.reshape(len(W), W.shape[1], math.prod(W.shape[2:])).swapaxes(1, 2)
        turned = ((columns @ self.A1) @ self.A2).swapaxes(1, 2).reshape(W.shape)
        added = (self.B1 @ self.B2.reshape(len(self.B2), -1)).reshape(W.shape)
        new: Tensor = W + self.scaling * (turned + added)
        return new
