"""AdaLoRA: W' = W + scaling * B @ diag(E) @ A.  Zhang et al. 2023, https://arxiv.org/abs/2303.10512

The change has the form of a singular value decomposition. Training moves rank between weights: it drops entries of E
and the matching rows of A and columns of B. The E of a weight may lose all of its entries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from ..core.updates import tensor
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class AdaLoRA(LowRank):
    """W' = W + scaling * (B * E) @ A, in the shape of W."""

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2303.10512"

    A: Tensor = tensor("r columns")
    B: Tensor = tensor("out r")
    E: Tensor = tensor("r")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        columns = math.prod(W.shape[1:])
        A, B = random((rank, columns)) / columns**0.5, random((len(W), rank)) / rank**0.5
        return cls.from_fields(A=A, B=B, E=W.new_zeros(rank), **attributes)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.scaling * self.B * self.E, self.A
