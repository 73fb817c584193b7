"""VeRA: W' = W + diag(b) @ B @ diag(d) @ A.  Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454

A and B are random, fixed, and shared by all weights. A and B are large enough for the largest weight; each weight uses
the first columns of A and the first rows of B. Each weight has separate vectors b and d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, tensor
from ..io.computed import times
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class VeRA(LowRank):
    """W' = W + (b * B[:out]) @ (d * A[:, :in]); the weight has two axes."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="outs >= out and ins >= in", meaning="the shared matrices are smaller than the weight"),
    )
    paper = "https://arxiv.org/abs/2310.11454"

    b: Tensor = tensor("out")
    B: Tensor = tensor("outs r")
    d: Tensor = tensor("r")
    A: Tensor = tensor("r ins")

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        outs, ins = (max(shape[axis] for shape in shapes) for axis in (0, 1))
        return {"A": random((rank, ins)) * (6 / ins) ** 0.5, "B": random((outs, rank)) * (6 / rank) ** 0.5}

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, A: Tensor | None = None, **attributes: object
    ) -> Self:
        shared = cls.shared([tuple(W.shape)], rank, random)
        A = shared["A"] if A is None else A
        fields = {"A": A, "B": shared["B"], **attributes}
        return cls.from_fields(b=W.new_zeros(len(W)), d=W.new_full((len(A),), 0.1), **fields)

    def largest_shape(self) -> tuple[int, ...]:
        return self.b.shape[-1], self.A.shape[-1]

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.b[:, None] * self.B[: shape[0]], self.d[:, None] * self.A[:, : shape[1]]

    def scaled(self, weight: float) -> Self | None:
        return self.replace(b=times(self.b, weight))

    def block(self, axis: str, start: int, stop: int) -> Self:
        if axis == "in":
            return self.replace(A=self.A[:, start:stop])
        return self.replace(B=self.B[start:stop], b=self.b[start:stop])
