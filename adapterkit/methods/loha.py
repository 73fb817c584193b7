"""LoHa: W' = W + scaling * (w1_a @ w1_b) * (w2_a @ w2_b).  Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098

The product of two low-rank products, element by element, has rank up to r * r. For convolutions each of the two may
have a Tucker core: then it is `sum_ij t[i, j, *k] w_a[o, i] w_in[j, n]`, as in LyCORIS, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

from ..errors import Malformed
from ..tensors.products import tucker
from ..updates import Additive, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class LoHa(Additive):
    """W' = W + scaling * P1 * P2; P1 and P2 are both plain products, or both have a core."""

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2108.06098"

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
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        columns = math.prod(W.shape[1:])
        w1_a, w2_a = (random((len(W), rank)) / rank**0.5 for _ in range(2))
        w1_b = random((rank, columns)) / columns**0.5
        return cls(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=W.new_zeros(rank, columns), **attributes)

    def check(self) -> None:
        super().check()
        present = {name for name in ("w1_b", "w2_b", "t1", "w1_in", "t2", "w2_in") if getattr(self, name) is not None}
        if present not in ({"w1_b", "w2_b"}, {"t1", "w1_in", "t2", "w2_in"}):
            raise Malformed("needs w1_b and w2_b, or t1, w1_in, t2 and w2_in", cure="Write the adapter again")

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        one = _product(self.w1_a, self.w1_b, self.t1, self.w1_in)
        two = _product(self.w2_a, self.w2_b, self.t2, self.w2_in)
        return (self.scaling * one * two).reshape(shape)


def _product(a: Tensor, b: Tensor | None, core: Tensor | None, inputs: Tensor | None) -> Tensor:
    """One factor of the change, `[out, in * k]`."""
    if b is not None:
        return a @ b
    assert core is not None
    assert inputs is not None
    product: Tensor = tucker(core, a, inputs)
    return product
