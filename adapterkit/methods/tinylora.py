"""TinyLoRA: W' = W + B @ (sum_i v[i] * P[i]) @ A.  "Learning to Reason in 13 Parameters", arXiv:2602.04118

A and B are the weight's first singular vectors, multiplied by the square roots of the singular values. P is random. A,
B and P are fixed. Only the few values in v are trained; several layers may share one v.
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

COUNT = 64
"""The number of trained values in a new update."""


class TinyLoRA(LowRank):
    """W' = W + B @ R @ A, R = sum_i v[i] * P[i]."""

    blocks = frozenset({"out", "in"})
    linear_only = True
    paper = "https://arxiv.org/abs/2602.04118"
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B", "P"})

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    P: Tensor = tensor("u r r")
    v: Tensor = tensor("u")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        U, S, Vh = namespace(W).linalg.svd(W, full_matrices=False)
        root = S[:rank] ** 0.5
        # P should have the variance 1 / r. Uniform numbers from -1 to 1 have the variance 1 / 3, so scale them.
        P = random((COUNT, len(root), len(root))) * (3 / len(root)) ** 0.5
        tensors = {"A": root[:, None] * Vh[:rank], "B": U[:, :rank] * root, "P": P, "v": W.new_zeros(COUNT)}
        return cls.from_fields(**{**tensors, **attributes})

    def scaled(self, weight: float) -> Self | None:
        return self.replace(v=times(self.v, weight))

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        u, r, _ = self.P.shape
        R = (self.v @ self.P.reshape(u, r * r)).reshape(r, r)
        return self.B, R @ self.A
