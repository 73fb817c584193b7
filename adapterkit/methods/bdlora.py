"""BD-LoRA: LoRA with a block-diagonal A or B, for serving on several devices.

Wang et al. 2025, https://arxiv.org/abs/2510.23346

W' = W + scaling * B @ A. Only the n blocks of the block-diagonal factor are stored. Each block of A reads 1/n of the
inputs; each block of B writes 1/n of the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..errors import ShapeMismatch
from ._low_rank import LowRank, block_diagonal

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class BDLoRA(LowRank):
    """W' = W + scaling * B @ A; either A or B is block-diagonal, and only its blocks are stored."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ((("A_blocks", "B"), ("A", "B_blocks")),)
    paper = "https://arxiv.org/abs/2510.23346"

    A_blocks: Tensor | None = tensor("n p in/n", optional=True)
    B_blocks: Tensor | None = tensor("n out/n p", optional=True)
    A: Tensor | None = tensor("n*p in", optional=True)
    B: Tensor | None = tensor("out n*p", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        A_blocks: int = 0,
        B_blocks: int | None = None,
        **attributes: object,
    ) -> Self:
        """Start with B = 0. `B_blocks=n` divides B into n blocks; `A_blocks=n` divides A. Default: `B_blocks=2`."""
        (out, in_), n = W.shape, int(A_blocks)
        m = int(B_blocks) if B_blocks is not None else 0 if n else 2
        if rank % (n or m) or (in_ % n if n else out % m):
            why = f"a weight {[out, in_]} and the rank {rank} cannot be divided into {n or m} equal blocks"
            raise ShapeMismatch(
                why, cure="Pass A_blocks= that divides rank and inputs, or B_blocks= that divides rank and outputs"
            )
        A = random((n, rank // n, in_ // n)) if n else random((rank, in_))
        B = W.new_zeros(out, rank) if n else W.new_zeros(m, out // m, rank // m)
        names = ("A_blocks", "B") if n else ("A", "B_blocks")
        return cls.from_fields(**dict(zip(names, (A / in_**0.5, B), strict=True)), **attributes)

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A, B = _whole(self.A, self.A_blocks), _whole(self.B, self.B_blocks)
        return self.scaling * B, A

    def block(self, axis: str, start: int, stop: int) -> Self:
        A, B = _whole(self.A, self.A_blocks), _whole(self.B, self.B_blocks)
        A, B = (A[:, start:stop], B) if axis == "in" else (A, B[start:stop])
        return self.replace(A=A, B=B, A_blocks=None, B_blocks=None)


def _whole(factor: Tensor | None, blocks: Tensor | None) -> Tensor:
    if factor is not None:
        return factor
    assert blocks is not None
    return block_diagonal(blocks)
