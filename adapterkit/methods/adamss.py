"""AdaMSS: a low-rank change for each group of rows of W; all groups share one basis of the input space.

https://openreview.net/forum?id=8ZdWmpYxT0

The basis consists of the right singular vectors of W with the largest singular values. PEFT computes the groups by
k-means on the left singular vectors. Each group has a pair of factors: row o of the change is B[o] @ A[g] @ basis,
where g is the group of row o. The bias is treated as one more column of W. `basis_bias` is the column of the basis that
belongs to the bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.namespace import namespace
from ..linalg.rotations import singular
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


GROUPS = 5
"""The number of groups in a new update, as in PEFT."""


class AdaMSS(LowRank):
    """W' = W + B @ A @ basis and b' = b + B @ A @ basis_bias; each row of W and b uses the A of its group."""

    linear_only = True
    since: ClassVar[tuple[str, ...]] = ("1.1",)
    paper = "https://openreview.net/forum?id=8ZdWmpYxT0"
    frozen: ClassVar[frozenset[str]] = frozenset({"basis", "basis_bias", "group", "ranks"})

    A: Tensor = tensor("g w r")
    B: Tensor = tensor("out w")
    basis: Tensor = tensor("r in")
    basis_bias: Tensor | None = tensor("r", optional=True)
    group: Tensor = tensor("out", integer=True, below="g")
    ranks: Tensor = tensor("g", integer=True)
    seed: int = 0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        """Divide the rows of W into groups of consecutive rows of about equal size; PEFT uses k-means instead."""
        groups, r = min(GROUPS, len(W)), min(rank, *W.shape)
        rows = namespace(W).arange(len(W), device=W.device)
        return cls.from_fields(
            A=random((groups, 1, r)) / r**0.5, B=W.new_zeros(len(W), 1), basis=singular(W)[2][:r] * 1,
            group=rows * groups // len(W), ranks=rows[:groups] * 0 + 1, **attributes,
        )  # fmt: skip

    @property
    def changes_bias(self) -> bool:
        return self.basis_bias is not None

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self._placed(), self._rows() @ self.basis

    def bias_delta(self) -> Tensor | None:
        return None if self.basis_bias is None else self._placed() @ (self._rows() @ self.basis_bias)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y, d = super().forward(x, layer), self.bias_delta()
        return y if d is None else y + layer.per_channel(d)

    def _placed(self) -> Tensor:
        """Return B as `[out, g * w]`: each row of B is in the w columns of its group, and all other elements are 0."""
        xp, (groups, width, _) = namespace(self.A), self.A.shape
        onehot = xp.eye(groups, dtype=self.B.dtype, device=getattr(self.B, "device", None))
        onehot = onehot[xp.astype(self.group, xp.int64)]
        return (onehot[:, :, None] * self.B[:, None, :]).reshape(-1, groups * width)

    def _rows(self) -> Tensor:
        """Return the factors A of all groups, stacked to `[g * w, r]`."""
        return self.A.reshape(-1, self.A.shape[2])
