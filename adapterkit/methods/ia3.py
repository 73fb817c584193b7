"""IA3: W' = l * W on outputs, W' = W * l on inputs.  Liu et al. 2022, https://arxiv.org/abs/2205.05638

On outputs, l also scales the bias. The paper scales the outputs of the key and value projections, and the input of a
feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ..core.updates import WeightUpdate, tensor
from ..linalg.namespace import summed

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class IA3(WeightUpdate):
    """Scales outputs (weight rows and bias) by `l`, or inputs (weight columns) by `l_in`; exactly one is present."""

    blocks = frozenset({"out", "in"})
    needs_bias = False
    forms = ((("l",), ("l_in",)),)
    paper = "https://arxiv.org/abs/2205.05638"

    l: Tensor | None = tensor("out", optional=True)  # noqa: E741 - the paper's name
    l_in: Tensor | None = tensor("in", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return cls.from_fields(l=W.new_ones(len(W)), **attributes)

    @classmethod
    def mixed(  # pyright: ignore[reportIncompatibleMethodOverride] - all updates have the class of `cls`
        cls, updates: Sequence[Self], weights: Sequence[float]
    ) -> Self | None:
        """Combine updates by a weighted sum of the differences l - 1."""
        names = {name for update in updates for name in update.tensors}
        if len(names) > 1:
            return None
        (name,) = names
        terms = (w * (getattr(update, name) - 1) for w, update in zip(weights, updates, strict=True))
        return cls(**{name: 1 + summed(terms)})

    @property
    def changes_bias(self) -> bool:
        return self.l is not None

    def new_weight(self, W: Tensor) -> Tensor:
        if self.l is not None:
            return W * self.l.reshape(-1, *[1] * (W.ndim - 1))
        assert self.l_in is not None
        return W * self.l_in.reshape(1, -1, *[1] * (W.ndim - 2))

    def new_bias(self, b: Tensor) -> Tensor:
        return b if self.l is None else b * self.l
