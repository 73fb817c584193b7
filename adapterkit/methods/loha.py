"""LoHa: W' = W + scaling * (w1_a @ w1_b) * (w2_a @ w2_b).  Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098

The elementwise product of two low-rank products has a rank of up to r * r. For convolutions, both products may have a
Tucker core t. Each product is then `sum_ij t[i, j, *k] w_a[o, i] w_in[j, n]`, as in LyCORIS,
https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self, cast

from ..core.updates import Additive, tensor
from ..linalg.products import contracted

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class LoHa(Additive):
    """W' = W + scaling * P1 * P2; P1 and P2 are low-rank products, both with or both without a Tucker core."""

    blocks = frozenset({"out"})
    forms = ((("w1_b", "w2_b"), ("t1", "w1_in", "t2", "w2_in")),)
    paper = "https://arxiv.org/abs/2108.06098"
    dropout: ClassVar[str] = "scaled rows"

    w1_a: Tensor = tensor("out r")
    w1_b: Tensor | None = tensor("r columns", optional=True)
    w2_a: Tensor = tensor("out r")
    w2_b: Tensor | None = tensor("r columns", optional=True)
    t1: Tensor | None = tensor("r r *k", optional=True)
    w1_in: Tensor | None = tensor("r in", optional=True)
    t2: Tensor | None = tensor("r r *k", optional=True)
    w2_in: Tensor | None = tensor("r in", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        columns = math.prod(W.shape[1:])
        w1_a, w2_a = (random((len(W), rank)) / rank**0.5 for _ in range(2))
        w1_b = random((rank, columns)) / columns**0.5
        return cls.from_fields(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=W.new_zeros(rank, columns), **attributes)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        one = self.w1_a @ _right(self.w1_b, self.t1, self.w1_in)
        two = self.w2_a @ _right(self.w2_b, self.t2, self.w2_in)
        D: Tensor = (self.scaling * one * two).reshape(shape)
        return D

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return B and A, whose rank is r * r.

        Column i * r + j of B is the elementwise product of column i of w1_a and column j of w2_a, times `scaling`. Row
        i * r + j of A is the elementwise product of row i of P1's right factor and row j of P2's right factor.
        """
        one, two = _right(self.w1_b, self.t1, self.w1_in), _right(self.w2_b, self.t2, self.w2_in)
        B = (self.scaling * self.w1_a)[:, :, None] * self.w2_a[:, None, :]
        return B.reshape(len(B), -1), (one[:, None] * two[None]).reshape(-1, one.shape[-1])


def _right(b: Tensor | None, core: Tensor | None, inputs: Tensor | None) -> Tensor:
    """Return the right factor `[r, in * k]` of P1 or P2: `b` if given, else the Tucker core `core` times `inputs`."""
    return b if b is not None else contracted(cast("Tensor", core), cast("Tensor", inputs))
