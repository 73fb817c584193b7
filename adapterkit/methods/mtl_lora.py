"""MTL-LoRA: W' = W + scaling * (sum_i w_i B_i) @ diag(values) @ A, w = softmax(weights / sharpness).

Yang et al. 2024, https://arxiv.org/abs/2410.09437. This is the formula for one task. Tasks share A and B; each task has
its own weights and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import attribute, tensor
from ..linalg.namespace import namespace
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


SHARPEST = 1e-6
"""The smallest valid `sharpness`.

If `sharpness` were smaller, the division `weights / sharpness` could overflow. Also, each w_i would be 0 or 1, unless
the largest weights are almost equal.
"""


class MTLLoRA(LowRank):
    """W' = W + scaling * (sum_i w_i B_i) @ diag(values) @ A, w = softmax(weights / sharpness)."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    paper = "https://arxiv.org/abs/2410.09437"
    sizes: ClassVar[Mapping[str, int]] = {"count": 2}

    A: Tensor = tensor("r in")
    B: Tensor = tensor("n out r")
    values: Tensor = tensor("r")
    weights: Tensor = tensor("n")
    scaling: float = 1.0
    sharpness: float = attribute(0.05, least=SHARPEST)

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, count: int | None = None, **attributes: object
    ) -> Self:
        count = cls.sizes["count"] if count is None else count
        A = random((rank, W.shape[1])) / W.shape[1] ** 0.5
        # Start with pairs of opposite factors B, which cancel out. If all factors B were equal at the start (for
        # example, all zero), then training would keep the factors equal, and would also keep their weights equal.
        Z = 0.1 * random((len(W), rank)) if count > 1 else W.new_zeros(len(W), rank)
        signs = W.new_tensor([(-1.0) ** i if i < count - count % 2 else 0.0 for i in range(count)])
        B = signs[:, None, None] * Z
        return cls.from_fields(A=A, B=B, values=W.new_ones(rank), weights=W.new_ones(count), **attributes)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        xp = namespace(self.weights)
        shares = xp.exp((self.weights - xp.max(self.weights)) / self.sharpness)
        B = (shares[:, None, None] * self.B).sum(0) / shares.sum()
        return self.scaling * B, self.values[:, None] * self.A
