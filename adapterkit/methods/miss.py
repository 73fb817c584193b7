"""MiSS: W'[o, i] = W[o, i] + D[i mod r, o].  Kang and Yin 2024, https://arxiv.org/abs/2409.15371

MiSS is the successor of Bone. The block D is repeated over the inputs. The mini form stores a narrower block, which is
also repeated over the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from ..core.updates import Additive, Rule, tensor
from ..io.computed import times
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class MiSS(Additive):
    """W'[o, i] = W[o, i] + D[i mod r, o] or W[o, i] + mini[i mod r, o mod m]; either D or mini is present."""

    linear_only = True
    blocks = frozenset({"out", "in"})
    forms = ((("D",), ("mini",)),)
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(when="has(D)", require="r >= 1", meaning="D has no rows"),
        Rule(
            when="has(mini)",
            require="r >= 1 and out % m == 0",
            meaning="mini has no rows, or the number of outputs is not a multiple of m",
        ),
    )
    paper = "https://arxiv.org/abs/2409.15371"

    D: Tensor | None = tensor("r out", optional=True)
    mini: Tensor | None = tensor("r m", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return cls.from_fields(D=W.new_zeros(rank, len(W)), **attributes)

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        plane: Tensor = _repeated(self._any, 0, shape[1], 0, shape[0])
        return plane.mT

    def scaled(self, weight: float) -> Self | None:
        return self.map(lambda leaf: times(leaf, weight))

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return B and A.

        B is the transposed block, repeated over the outputs. A is an identity matrix, repeated over the inputs.
        """
        some = self._any
        B = _repeated(some, 0, len(some), 0, shape[0]).mT
        identity = namespace(some).eye(len(some), dtype=some.dtype, device=getattr(some, "device", None))
        return B, _repeated(identity, 0, len(some), 0, shape[1])

    def block(self, axis: str, start: int, stop: int) -> Self:
        some = self._any
        if axis == "in":
            r, tensors = len(some), cast(dict[str, Any], self.tensors)
            return self.replace(**{name: leaf[[(start + i) % r for i in range(r)]] for name, leaf in tensors.items()})
        return self.replace(D=_repeated(some, 0, len(some), start, stop), mini=None)

    @property
    def _any(self) -> Tensor:
        return cast("Tensor", next(iter(self.tensors.values())))


def _repeated(block: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Return rows `top` to `bottom` and columns `left` to `right` of an infinite plane that is tiled with a block."""
    rows, columns = block.shape
    return block[[i % rows for i in range(top, bottom)]][:, [o % columns for o in range(left, right)]]
