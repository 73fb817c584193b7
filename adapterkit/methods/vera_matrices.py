"""VeRA with matrices E and D in place of the vectors b and d: W' = W + scaling * E @ B @ D @ A.

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454. AdapterHub trains full matrices D and E, which are diagonal in
the paper. A and B are fixed, and the same for all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class VeRAMatrices(LowRank):
    """W' = W + scaling * (E @ B) @ (D @ A); the weight has two axes."""

    linear_only = True
    blocks = frozenset({"in"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    paper = "https://arxiv.org/abs/2310.11454"

    A: Tensor = tensor("r in")
    B: Tensor = tensor("out r")
    D: Tensor = tensor("r r")
    E: Tensor = tensor("out out")
    scaling: float = 1.0

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            return {}
        return cls._fixed(shapes[0], rank, random)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        fields: dict[str, object] = {**cls._fixed(tuple(W.shape), rank, random), **attributes}
        D = 0.1 * (W.new_zeros(rank, rank) + 1).tril().triu()
        return cls.from_fields(D=D, E=W.new_zeros(len(W), len(W)), **fields)

    @staticmethod
    def _fixed(shape: tuple[int, ...], rank: int, random: Random) -> dict[str, Tensor]:
        out, in_ = shape[0], shape[1]
        return {"A": random((rank, in_)) * (6 / in_) ** 0.5, "B": random((out, rank)) * (6 / rank) ** 0.5}

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.scaling * (self.E @ self.B), self.D @ self.A
