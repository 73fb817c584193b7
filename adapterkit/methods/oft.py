"""OFT: rotations of blocks of a weight's inputs or outputs.  Qiu et al. 2023, https://arxiv.org/abs/2306.07280

Each rotation is the Cayley transform R = (I - Q) inverse(I + Q) of a skew-symmetric Q. OFT v2
(https://arxiv.org/abs/2506.19847) uses the first terms of the series of (I + Q) inverse(I - Q) instead. PEFT rotates
the inputs of linear and convolution layers and the outputs of embeddings. It stores Q's upper triangle. LyCORIS
(https://arxiv.org/abs/2309.14859) rotates outputs, and may rescale the result. It stores a square matrix S for each
block, with Q = S^T - S. In LyCORIS's bypass mode, the bias is rotated too (`on_output`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Self, cast

from ..core.updates import Rule, WeightUpdate, attribute, tensor
from ..linalg.rotations import shortened, shortened_blocks, skew, turn_columns, turn_rows, turned

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class OFT(WeightUpdate):
    """W' = W @ blockdiag(R)^T if `side` is "in", or rescale * blockdiag(R)^T @ W if `side` is "out".

    If the adapter stores a single block, blockdiag(R) repeats this block.
    """

    blocks = frozenset({"in", "out"})
    needs_bias = False
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(
            when="side == 'out'",
            require="out % b == 0",
            meaning="the number of outputs is not a multiple of the block size b",
        ),
        Rule(
            when="side == 'in'",
            require="columns % b == 0",
            meaning="the number of columns is not a multiple of the block size b",
        ),
    )
    paper = "https://arxiv.org/abs/2306.07280"
    dropout: ClassVar[str] = "blocks"
    forms = ((("pairs",), ("square",)),)
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(require="side == 'out'", when="has(rescale)", where="rescale", error="Malformed"),
        Rule(require="side == 'out'", when="on_output", where="on_output", error="Malformed"),
        Rule(
            require="block(p) > 0",
            when="has(pairs)",
            where="pairs",
            meaning="its length is not b * (b - 1) / 2 for any block size b",
        ),
        Rule(define="b", value="block(p)", when="has(pairs)"),
        Rule(define="out", value="n * b", when="n != 1 and side == 'out'"),
        Rule(define="columns", value="n * b", when="n != 1 and side == 'in'"),
    )

    pairs: Tensor | None = tensor("n p", optional=True)
    square: Tensor | None = tensor("n b b", optional=True)
    rescale: Tensor | None = tensor("out", optional=True)
    side: str = attribute("in", among=("in", "out"))
    terms: int = attribute(0, least=0, most=100)
    doubled: bool = attribute(False, since=2)
    coft: bool = False
    eps: float = 6e-5
    constraint: float = 0.0
    on_output: bool = attribute(False, since=2)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        width = len(W) if attributes.get("side") == "out" else math.prod(W.shape[1:])
        size = math.gcd(rank, width)
        return cls.from_fields(pairs=W.new_zeros(width // size, size * (size - 1) // 2), **attributes)

    def cuts(self, axis: str) -> bool:
        return axis != self.side

    def new_weight(self, W: Tensor) -> Tensor:
        Q = self.square.mT - self.square if self.square is not None else skew(cast("Tensor", self.pairs))
        R = turned(self._constrained(Q), self.terms, self.doubled)
        new = turn_rows(W, R) if self.side == "out" else turn_columns(W.reshape(len(W), -1), R).reshape(W.shape)
        return new if self.rescale is None else new * self.rescale.reshape(-1, *[1] * (W.ndim - 1))

    @property
    def changes_bias(self) -> bool:
        return self.on_output

    def new_bias(self, b: Tensor) -> Tensor:
        return self.new_weight(b[:, None])[:, 0] if self.on_output else b

    def _constrained(self, Q: Tensor) -> Tensor:
        """Scale Q down if its norm exceeds a limit.

        With `coft`, the norm of each block has a limit. With `constraint`, as in LyCORIS, the norm of all blocks
        together has a limit.
        """
        if self.coft:
            Q = shortened_blocks(Q, self.eps)
        return shortened(Q, (Q * Q).sum(), self.constraint, 1e-8) if self.constraint > 0 else Q
