"""Dense difference: W' = W + scaling * D, b' = b + scaling * d.  Every additive method can be converted to `Dense`.

LyCORIS and kohya files store D under the key `diff`, https://github.com/KohakuBlueleaf/LyCORIS (module "full").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..core.updates import Additive, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class Dense(Additive):
    """W' = W + scaling * D, b' = b + scaling * d; at least one of D and d is present."""

    blocks = frozenset({"out", "in"})
    paper = "https://arxiv.org/abs/2309.14859"

    D: Tensor | None = tensor("out *rest", optional=True)
    d: Tensor | None = tensor("out", optional=True)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return cls.from_fields(D=0 * W, **attributes)

    @property
    def changes_weight(self) -> bool:
        return self.D is not None

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        assert self.D is not None
        return self.scaling * self.D.reshape(shape)

    @property
    def changes_bias(self) -> bool:
        return self.d is not None

    def bias_delta(self) -> Tensor | None:
        return None if self.d is None else self.scaling * self.d

    def block(self, axis: str, start: int, stop: int) -> Self:
        if axis != "in":
            return super().block(axis, start, stop)
        return self if self.D is None else self.replace(D=self.D[:, start:stop])
