"""GraLoRA: a LoRA of its own for each of g x g blocks of the weight.  Jung et al. 2025, https://arxiv.org/abs/2505.20355

Of the r = g * q ranks of a slice of inputs, q go to each slice of outputs. The hybrid form adds a LoRA of the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..updates import tensor
from ._planar import Planar

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class GraLoRA(Planar):
    """W' = W + scaling * (D + B_whole @ A_whole), D's block of outputs j and inputs n being A[n, :, j] @ B[j, n]."""

    paper = "https://arxiv.org/abs/2505.20355"
    forms = (((), ("A_whole", "B_whole")),)

    A: Tensor = tensor("g in/g g*q")
    B: Tensor = tensor("g g*q out/g")
    A_whole: Tensor | None = tensor("h in", optional=True)
    B_whole: Tensor | None = tensor("out h", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        out, in_ = W.shape
        g = 1 if out % 2 or in_ % 2 or rank % 2 else 2
        A = random((g, in_ // g, rank)) / (in_ // g) ** 0.5
        return cls(**{"A": A, "B": W.new_zeros(g, rank, out // g), **attributes})

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        g, _, r = self.A.shape
        A = self.A.reshape(g, -1, g, r // g).swapaxes(0, 2).swapaxes(1, 2).mT
        B = self.B.reshape(g, g, r // g, -1).mT
        D = (B @ A).swapaxes(1, 2).reshape(shape)
        if self.A_whole is not None and self.B_whole is not None:
            D = D + self.B_whole @ self.A_whole
        return self.scaling * D
