"""RoAd: rotates and scales the outputs in pairs.  Liao and Monz 2024, https://arxiv.org/abs/2409.00119

Output i of the first half of a group is paired with output i of the second half, and each pair is multiplied by a 2x2
matrix. Each entry of the matrix is computed from an angle and a scale. In variant 1, all four entries have the same
angle and scale. In variant 2, the two entries of a row have the same angle and scale. In variant 4, each entry has a
separate angle and scale; in theta and alpha, the values of each group's diagonal entries come first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, WeightUpdate, attribute, tensor
from ..errors import ShapeMismatch
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class RoAd(WeightUpdate):
    """W' = R @ W, b' = R @ b; R has alpha * cos(theta) on its diagonal and +-alpha * sin(theta) off the diagonal."""

    blocks = frozenset({"in"})
    needs_bias = False
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="out % group == 0", meaning="the number of outputs is not a multiple of group"),
    )
    paper = "https://arxiv.org/abs/2409.00119"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="group % 2 == 0",
            where="group",
            error="Malformed",
            meaning="a group has an odd number of outputs",
        ),
        Rule(
            require="size * 2 % variant == 0",
            where="theta",
            meaning="the length of theta does not fit a whole number of outputs",
        ),
        Rule(define="out", value="size * 2 // variant", where="theta"),
    )

    theta: Tensor = tensor("size")
    alpha: Tensor = tensor("size")
    variant: int = attribute(1, among=(1, 2, 4))
    group: int = attribute(2, least=2)

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, variant: int = 1, **attributes: object
    ) -> Self:
        if len(W) % 2:
            raise ShapeMismatch(f"{len(W)} outputs do not form pairs", cure="Remove this target")
        size = len(W) * variant // 2
        return cls.from_fields(theta=W.new_zeros(size), alpha=W.new_ones(size), variant=variant, **attributes)

    @property
    def changes_bias(self) -> bool:
        return True

    def new_weight(self, W: Tensor) -> Tensor:
        return self._turned(W.reshape(len(W), -1)).reshape(W.shape)

    def new_bias(self, b: Tensor) -> Tensor:
        return self._turned(b[:, None])[:, 0]

    def _turned(self, Y: Tensor) -> Tensor:
        """Return R @ Y, for Y `[out, columns]`."""
        xp, half = namespace(Y), self.group // 2
        # Variant 1 has a value per pair of outputs, variant 2 a value per output, variant 4 two values per output.
        shape = (-1, 2, 2, half, 1) if self.variant == 4 else (-1, 1, self.variant, half, 1)
        first = (self.alpha * xp.cos(self.theta)).reshape(shape)[:, 0]
        second = (self.alpha * xp.sin(self.theta)).reshape(shape)[:, -1]
        pairs = Y.reshape(-1, 2, half, Y.shape[1])
        other = xp.stack([-pairs[:, 1], pairs[:, 0]], axis=1)
        turned: Tensor = first * pairs + second * other
        return turned.reshape(Y.shape)
