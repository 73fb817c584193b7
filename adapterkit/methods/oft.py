"""OFT: rotations of blocks of a weight's inputs or outputs.  Qiu et al. 2023, https://arxiv.org/abs/2306.07280

Each rotation is the Cayley transform R = (I - Q) inverse(I + Q) of a skew-symmetric Q, or, as in OFT v2
(https://arxiv.org/abs/2506.19847), the first terms of the series of (I + Q) inverse(I - Q). PEFT turns the inputs of
linear and convolution layers and the outputs of embeddings, and stores what stands above Q's diagonal; LyCORIS
(https://arxiv.org/abs/2309.14859) turns outputs, stores whole blocks, and may rescale what comes out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import Malformed, ShapeMismatch
from ..shapes import Dims
from ..tensors.rotations import block_size, shortened, shortened_blocks, skew, turn_columns, turn_rows, turned
from ..updates import WeightUpdate, attribute, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class OFT(WeightUpdate):
    """W' = W @ blockdiag(R)^T on inputs, rescale * blockdiag(R)^T @ W on outputs; one stored block serves for all."""

    blocks = frozenset({"in", "out"})
    paper = "https://arxiv.org/abs/2306.07280"
    dropout: ClassVar[str] = "blocks"
    forms = ((("pairs",), ("square",)),)

    pairs: Tensor | None = tensor("n p", optional=True)
    square: Tensor | None = tensor("n b b", optional=True)
    rescale: Tensor | None = tensor("out", optional=True)
    side: str = attribute("in", among=("in", "out"))
    terms: int = attribute(0, least=0, most=100)
    doubled: bool = False
    coft: bool = False
    eps: float = 6e-5
    constraint: float = 0.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        width = len(W) if attributes.get("side") == "out" else math.prod(W.shape[1:])
        size = math.gcd(rank, width)
        return cls(pairs=W.new_zeros(width // size, size * (size - 1) // 2), **attributes)

    def check(self) -> None:
        super().check()
        if self.rescale is not None and self.side == "in":
            raise Malformed("a factor on outputs beside turned inputs", where="rescale", cure="Write the adapter again")

    def dims(self, stack: bool = False) -> Dims:
        dims: Any = super().dims(stack)
        size = dims["b"] if self.pairs is None else block_size(dims["p"])
        if not size:
            why = f"{dims['p']} numbers do not fill one side of a square matrix"
            raise ShapeMismatch(why, where="pairs", cure="Write the adapter again")
        turned = "out" if self.side == "out" else "columns"
        return {**dims, "b": size} if dims["n"] == 1 else {**dims, "b": size, turned: dims["n"] * size}

    def check_against(self, shape: tuple[int, ...]) -> None:
        size = block_size(self.pairs.shape[-1]) if self.square is None else self.square.shape[-1]  # type: ignore[union-attr]
        width = shape[0] if self.side == "out" else math.prod(shape[1:])
        if width % size:
            raise ShapeMismatch(f"blocks of {size} do not make up {width}", cure="The adapter is not of this base")

    def cuts(self, axis: str) -> bool:
        return axis != self.side

    def new_weight(self, W: Tensor) -> Any:
        Q = self._constrained(skew(self.pairs) if self.square is None else self.square.mT - self.square)
        R = turned(Q, self.terms, self.doubled)
        new = turn_rows(W, R) if self.side == "out" else turn_columns(W.reshape(len(W), -1), R).reshape(W.shape)
        return new if self.rescale is None else new * self.rescale.reshape(-1, *[1] * (W.ndim - 1))

    def _constrained(self, Q: Any) -> Any:
        """Q, shortened where it is longer than allowed: each block (COFT), or all of them together (LyCORIS)."""
        if self.coft:
            Q = shortened_blocks(Q, self.eps)
        return shortened(Q, (Q * Q).sum(), self.constraint, 1e-8) if self.constraint > 0 else Q
