"""BOFT as in LyCORIS: a butterfly product of block rotations on the outputs.  https://arxiv.org/abs/2309.14859

The original BOFT (https://arxiv.org/abs/2311.06243) rotates inputs. PEFT's BOFT also rotates inputs, and its
permutations differ from the permutations P_i of this method. Here, a block of b outputs in factor i consists of pairs
of outputs at a distance of b / 2 * 2^i. The permutation P_i puts the two outputs of each pair next to each other. The
skew-symmetric matrix square^T - square is not divided by 2. LyCORIS's bypass mode also rotates the bias (`on_output`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, attribute, tensor
from ..linalg.rotations import cayley, shortened, turn_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class BOFTOutputs(WeightUpdate):
    """W' = rescale * M_(m-1) ... M_0 @ W, M_i = P_i^T @ blockdiag(cayley(square^T - square)) @ P_i."""

    blocks = frozenset({"in"})
    needs_bias = False
    paper = "https://arxiv.org/abs/2309.14859"
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="m <= n and b % 2 == 0 and n % 2 ** (m - 1) == 0",
            where="square",
            meaning="m factors need an even block size, and the number of blocks must be a multiple of 2 ** (m - 1)",
        ),
        Rule(define="out", value="n * b", where="square"),
    )

    square: Tensor = tensor("m n b b")
    rescale: Tensor | None = tensor("out", optional=True)
    constraint: float = 0.0
    on_output: bool = attribute(False, since=2)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        size = max(n for n in range(2, max(rank, 2) + 1, 2) if len(W) % n == 0 or n == 2)
        return cls.from_fields(square=W.new_zeros(1, len(W) // size, size, size), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        Q = self.square.mT - self.square
        if self.constraint > 0:
            Q = shortened(Q, (Q * Q).sum(), self.constraint, 1e-8)
        X, half = W.reshape(len(W), -1), self.square.shape[-1] // 2
        for i, rotation in enumerate(cayley(Q)):
            there = _paired(len(W), half * 2**i)
            back = sorted(range(len(there)), key=there.__getitem__)
            X = turn_rows(X[there], rotation.mT)[back]
        X = X if self.rescale is None else X * self.rescale[:, None]
        return X.reshape(W.shape)

    @property
    def changes_bias(self) -> bool:
        return self.on_output

    def new_bias(self, b: Tensor) -> Tensor:
        return self.new_weight(b[:, None])[:, 0] if self.on_output else b


def _paired(width: int, apart: int) -> list[int]:
    """Return the indices 0 to `width` - 1, reordered: in every run of 2 * `apart` indices, i + `apart` follows i."""
    starts = range(0, width, 2 * apart)
    return [start + i + other for start in starts for i in range(apart) for other in (0, apart)]
