"""GraLoRA: a separate LoRA for each of g x g blocks of the weight.

Jung et al. 2025, https://arxiv.org/abs/2505.20355

The LoRA of each block has rank q. The g blocks that read the same slice of inputs together have rank r = g * q. The
hybrid form adds a LoRA of the whole weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import Additive, tensor
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class GraLoRA(Additive):
    """W' = W + scaling * (D + B_whole @ A_whole); block (j, n) of D is (A[n, :, J] @ B[j, N])^T.

    Block (j, n) reads slice n of the inputs, and writes slice j of the outputs. J are the q indices from j * q on, and
    N are the q indices from n * q on.
    """

    linear_only = True
    paper = "https://arxiv.org/abs/2505.20355"
    forms = (((), ("A_whole", "B_whole")),)

    A: Tensor = tensor("g in/g g*q")
    B: Tensor = tensor("g g*q out/g")
    A_whole: Tensor | None = tensor("h in", optional=True)
    B_whole: Tensor | None = tensor("out h", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        out, in_ = W.shape
        g = 1 if out % 2 or in_ % 2 or rank % 2 else 2
        A = random((g, in_ // g, rank)) / (in_ // g) ** 0.5
        return cls.from_fields(**{"A": A, "B": W.new_zeros(g, rank, out // g), **attributes})

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        A, B = self._blocks()
        D: Tensor = (B @ A).swapaxes(1, 2).reshape(shape)
        if self.A_whole is not None and self.B_whole is not None:
            D = D + self.B_whole @ self.A_whole
        scaled: Tensor = self.scaling * D
        return scaled

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return factors of rank g * r, in which all elements outside of the blocks are 0.

        In the hybrid form, the factors also contain A_whole and B_whole, so their rank is g * r + h.
        """
        A, B = self._blocks()
        xp = namespace(A)
        identity = xp.eye(len(A), dtype=A.dtype, device=getattr(A, "device", None))
        right = (A[:, :, :, None] * identity[None, :, None, :, None]).reshape(-1, shape[1])
        left = B.swapaxes(1, 2).swapaxes(0, 1)[None] * identity[:, None, :, None, None]
        left = self.scaling * left.reshape(shape[0], -1)
        if self.A_whole is not None and self.B_whole is not None:
            left = xp.concat([left, self.scaling * self.B_whole], axis=1)
            right = xp.concat([right, self.A_whole])
        return left, right

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Return A `[g, g, q, in / g]` and B `[g, g, out / g, q]`, indexed by slice of outputs and slice of inputs."""
        g, _, r = self.A.shape
        A = self.A.reshape(g, -1, g, r // g).swapaxes(0, 2).swapaxes(1, 2).mT
        return A, self.B.reshape(g, g, r // g, -1).mT
