"""RandLoRA: W' = W + scaling * sum_j B_j diag(lam_j) A diag(gamma_j).

Albert et al. 2025, https://arxiv.org/abs/2502.00987

The bases B_j and A are random, fixed, and shared by all weights. There are n matrices B_j with n * r >= min(out, in),
so the sum has full rank. A extends along the shorter side of the weight, B_j along the longer side. The sum is computed
as L @ S. Column j * r + k of L is column k of B_j. Row k * n + j of S is the elementwise product of row k of A and
gamma_j, times the number lam_j[k]. The two index orders differ, so column i of L and row i of S may belong to different
j, as in the authors' training code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, tensor
from ._low_rank import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class RandLoRA(LowRank):
    """W' = W + scaling * L @ S, or W + scaling * (L @ S)^T if `in` is longer than `out`; the weight has two axes."""

    linear_only = True
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="(short == out or short == in) and short <= out and short <= in",
            meaning="the adapter was made for a weight whose shorter side has another length",
        ),
        Rule(
            require="shorts >= short and longs >= out and longs >= in and bases >= n",
            meaning="the shared bases are smaller than the weight",
        ),
    )
    paper = "https://arxiv.org/abs/2502.00987"

    B: Tensor = tensor("longs bases r")
    lam: Tensor = tensor("r n")
    A: Tensor = tensor("r 1 shorts")
    gamma: Tensor = tensor("n short")
    scaling: float = 1.0

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, ...]], rank: int, random: Random) -> dict[str, Tensor]:
        sides = [max(shape[axis] for shape in shapes) for axis in (0, 1)]
        shorts, longs = min(sides), max(sides)
        bases = -(-shorts // rank)
        return {"A": random((rank, 1, shorts)) * 3**0.5, "B": random((longs, bases, rank)) * 3**0.5}

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, A: Tensor | None = None, **attributes: object
    ) -> Self:
        shared = cls.shared([tuple(W.shape)], rank, random)
        A = shared["A"] if A is None else A
        short = min(W.shape[:2])
        n = -(-short // len(A))
        gamma = W.new_full((n, short), 1 / max(n, short))
        return cls.from_fields(
            **{"A": A, "B": shared["B"], "lam": W.new_zeros(len(A), n), "gamma": gamma, **attributes}
        )

    def largest_shape(self) -> tuple[int, ...]:
        return self.B.shape[-3], self.gamma.shape[-1]

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        n, short = self.gamma.shape
        S = (self.A[..., :short] * self.lam[:, :, None] * self.gamma).reshape(-1, short)
        L = self.scaling * self.B[: max(shape), :n].reshape(max(shape), -1)
        return (S.mT, L.mT) if shape[1] > shape[0] else (L, S)
