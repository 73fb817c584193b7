"""LoRA-XS: W' = W + scaling * B @ R @ A.  Balazy et al. 2024, https://arxiv.org/abs/2405.17604

A contains the first right singular vectors of W before training. B contains the first left singular vectors, each times
its singular value. A and B stay fixed; only the small matrix R is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.namespace import namespace
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class LoRAXS(LowRank):
    """W' = W + scaling * B @ R @ A, in the shape of W."""

    blocks = frozenset({"out", "in"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    paper = "https://arxiv.org/abs/2405.17604"

    A: Tensor = tensor("r in *k")
    R: Tensor = tensor("r r")
    B: Tensor = tensor("out r")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        U, S, Vh = namespace(W).linalg.svd(W.reshape(len(W), -1), full_matrices=False)
        A = Vh[:rank].reshape(-1, *W.shape[1:])
        return cls.from_fields(A=A, R=W.new_zeros(len(A), len(A)), B=U[:, :rank] * S[:rank], **attributes)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.scaling * self.B, self.R @ self.A.reshape(len(self.A), -1)
