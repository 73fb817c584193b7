"""Super-Tuning: W' = W + S, where S is nonzero only at the weight's largest elements.

https://arxiv.org/abs/2607.09287

Each value in `index` is the position of an element in the weight, counted row by row. The hybrid form, Supra, also adds
a LoRA: `scaling * B @ A`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Additive, tensor
from ..io.computed import times
from ..linalg.positions import add_at, scattered
from ..linalg.products import product

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class SuperTuning(Additive):
    """W' = W with values added at [index // in, index % in], plus scaling * B @ A if A and B are present."""

    linear_only = True
    paper = "https://arxiv.org/abs/2607.09287"
    forms = (((), ("A", "B")),)
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    index: Tensor = tensor("n", integer=True, below="out*in", distinct=True)
    values: Tensor = tensor("n")
    A: Tensor | None = tensor("r in", optional=True)
    B: Tensor | None = tensor("out r", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        count = min(rank * (W.shape[0] + W.shape[1]), W.numel())
        index = W.abs().reshape(-1).topk(count).indices
        return cls.from_fields(**{"index": index, "values": W.new_zeros(count), **attributes})

    def scaled(self, weight: float) -> Self | None:
        return self.replace(values=times(self.values, weight), scaling=weight * self.scaling)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        sparse: Tensor = scattered(self.values, self.index, shape)
        return sparse if self.A is None or self.B is None else sparse + self.scaling * (self.B @ self.A)

    def delta_into(self, D: Tensor, weight: float) -> None:
        if self.A is None or self.B is None:
            D[...] = 0
        else:
            product(D, (weight * self.scaling) * self.B, self.A)
        add_at(D, self.index // D.shape[1], self.index % D.shape[1], weight * self.values)
