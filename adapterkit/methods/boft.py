"""BOFT: a butterfly product of block rotations on the inputs.  Liu et al. 2023, https://arxiv.org/abs/2311.06243

Each of m factors rotates blocks of b inputs. The permutation P_i of factor i reorders the inputs within every run of
b * 2^i inputs: the even-numbered chunks of b / 2 inputs come first, then the odd-numbered chunks. With a single factor,
P_0 is the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, tensor
from ..linalg.rotations import cayley, turn_columns

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class BOFT(WeightUpdate):
    """W' = s * W @ M_0^T ... M_(m-1)^T, M_i = P_i @ blockdiag(cayley((R_i - R_i^T) / 2)) @ P_i^T."""

    blocks = frozenset({"out"})
    paper = "https://arxiv.org/abs/2311.06243"
    dropout: ClassVar[str] = "blocks"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="m <= n and b % 2 == 0 and n % 2 ** (m - 1) == 0",
            when="m > 1",
            where="R",
            meaning="m factors need an even block size, and the number of blocks must be a multiple of 2 ** (m - 1)",
        ),
        Rule(define="columns", value="n * b", where="R"),
    )

    R: Tensor = tensor("m n b b")
    s: Tensor = tensor("out")

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        width = math.prod(W.shape[1:])
        size = math.gcd(rank, width)
        return cls.from_fields(R=W.new_zeros(1, width // size, size, size), s=W.new_ones(len(W)), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        X, size = W.reshape(len(W), -1), self.R.shape[-1]
        rotations = cayley((self.R - self.R.mT) / 2)
        for i, rotation in enumerate(rotations):
            there = _apart(X.shape[1], size * 2**i, size // 2) if len(rotations) > 1 else list(range(X.shape[1]))
            back = sorted(range(len(there)), key=there.__getitem__)
            X = turn_columns(X[:, back], rotation)[:, there]
        return (X * self.s[:, None]).reshape(W.shape)


def _apart(width: int, run: int, chunk: int) -> list[int]:
    """Return the indices 0 to `width` - 1 in the order of `P_i`.

    Every run of `run` indices consists of chunks of `chunk` indices. The run's even-numbered chunks come before its
    odd-numbered chunks.
    """
    firsts = [first for odd in (0, chunk) for first in range(odd, run, 2 * chunk)]
    return [start + first + i for start in range(0, width, run) for first in firsts for i in range(chunk)]
