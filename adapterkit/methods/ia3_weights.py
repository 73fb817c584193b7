"""IA3 as in LyCORIS: W' = W * (1 + w), with one w per output or per input.  https://arxiv.org/abs/2309.14859

The original IA3 (https://arxiv.org/abs/2205.05638) also scales the bias. Here the bias stays unchanged, except in
LyCORIS's bypass mode (`on_output`). The tensors contain the scales minus 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import WeightUpdate, attribute, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class IA3Weights(WeightUpdate):
    """W' = W * (1 + w) on rows, or W * (1 + w_in) on columns; exactly one of w and w_in is present."""

    blocks = frozenset({"out", "in"})
    needs_bias = False
    forms: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = ((("w",), ("w_in",)),)
    paper = "https://arxiv.org/abs/2309.14859"
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")

    w: Tensor | None = tensor("out", optional=True)
    w_in: Tensor | None = tensor("in", optional=True)
    on_output: bool = attribute(False, since=2)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return cls.from_fields(w=W.new_zeros(len(W)), **attributes)

    def new_weight(self, W: Tensor) -> Tensor:
        if self.w is not None:
            return W * (1 + self.w).reshape(-1, *[1] * (W.ndim - 1))
        assert self.w_in is not None
        return W * (1 + self.w_in).reshape(1, -1, *[1] * (W.ndim - 2))

    @property
    def changes_bias(self) -> bool:
        return self.on_output and self.w is not None

    def new_bias(self, b: Tensor) -> Tensor:
        return b * (1 + self.w) if self.on_output and self.w is not None else b
