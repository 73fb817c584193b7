"""DeLoRA: LoRA with the direction decoupled from the strength.  Bini et al. 2025, https://arxiv.org/abs/2503.18225

Row i of A and column i of B form a pair. Each of the r pairs is normalised, and `strength` bounds the sum of all pairs.
Input j is multiplied by `w_norm[j]`, the norm of column j of W at the start of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..io.computed import times
from ..linalg.namespace import namespace
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random

SMALLEST = 1e-4
"""The lower bound of the norms by which the rows of A and the columns of B are divided."""


class DeLoRA(LowRank):
    """W' = W + strength / r * sum_i B[:, i] A[i] * w_norm / (|A[i]| |B[:, i]|), each norm at least 1e-4."""

    linear_only = True
    paper = "https://arxiv.org/abs/2503.18225"
    frozen: ClassVar[frozenset[str]] = frozenset({"w_norm"})

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    strength: Tensor = tensor("1")
    w_norm: Tensor = tensor("in")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        tensors = {
            "A": random((rank, W.shape[1])) / W.shape[1] ** 0.5, "B": W.new_zeros(len(W), rank),
            "strength": W.new_tensor([15.0]), "w_norm": (W * W).sum(0) ** 0.5,
        }  # fmt: skip
        return cls.from_fields(**{**tensors, **attributes})

    def scaled(self, weight: float) -> Self | None:
        return self.replace(strength=times(self.strength, weight))

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.B * (self.strength / (len(self.A) * _norm(self.A, 1) * _norm(self.B, 0))), self.A * self.w_norm


def _norm(factor: Tensor, axis: int) -> Tensor:
    # Clip before taking the square root, because the square root's derivative at 0 is infinite.
    return namespace(factor).clip((factor * factor).sum(axis), SMALLEST**2, None) ** 0.5
