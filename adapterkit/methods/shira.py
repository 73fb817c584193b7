"""SHiRA: W' = W + S, with a sparse S.  Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175

Training changes only 1 to 2 percent of the weight's elements, yet the change has a high rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Additive, tensor
from ..io.computed import times
from ..linalg.positions import add_at, random_positions, scattered

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class SHiRA(Additive):
    """W'[index[0], index[1]] = W[index[0], index[1]] + values."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    paper = "https://arxiv.org/abs/2406.13175"
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    index: Tensor = tensor("2 n", integer=True, below="out in", distinct=True)
    values: Tensor = tensor("n")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        out, in_ = W.shape
        flat = random_positions(0, out * in_, rank * (out + in_)).sort().values
        index = flat.new_tensor([(flat // in_).tolist(), (flat % in_).tolist()])
        return cls.from_fields(**{"index": index, "values": W.new_zeros(len(flat)), **attributes})

    def scaled(self, weight: float) -> Self | None:
        return self.replace(values=times(self.values, weight))

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        dense: Tensor = scattered(self.values, self.index[0] * shape[1] + self.index[1], shape)
        return dense

    def delta_into(self, D: Tensor, weight: float) -> None:
        D[...] = 0
        add_at(D, self.index[0], self.index[1], weight * self.values)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        return math.sqrt(float((self.values * self.values).sum()))

    def block(self, axis: str, start: int, stop: int) -> Self:
        row = ("out", "in").index(axis)
        inside = (self.index[row] >= start) & (self.index[row] < stop)
        index = self.index[:, inside] * 1
        index[row] -= start
        return self.replace(index=index, values=self.values[inside])
