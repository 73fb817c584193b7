"""ReFT: h' = h + R^T (act(S h + b) - R h) at the first and last positions.

Wu et al. 2024, https://arxiv.org/abs/2404.03592

In LoReFT, the rows of R are orthonormal (`orthogonality`). In NoReFT and DiReFT, the rows need not be orthonormal.
DiReFT also does not subtract R h (`subtract_projection` is false).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import OutputUpdate, Rule, attribute, tensor
from ..linalg.activations import ACTIVATIONS
from ..linalg.namespace import namespace
from ..linalg.rotations import orthonormal_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class ReFT(OutputUpdate):
    """h' = h + (act(h @ source^T + source_bias) - h @ projection^T) @ projection, at the first and last positions only.

    Positions are on the axis before the channels. If a position is among the first and also among the last positions,
    only the change for the last positions applies. If the model is called with a mask `[rows, positions]`, only
    unmasked positions count.
    """

    hears = ("attention_mask",)

    paper = "https://arxiv.org/abs/2404.03592"
    forms: ClassVar[Any] = (
        ((), ("suffix_source", "suffix_projection"), ("suffix_source", "suffix_source_bias", "suffix_projection")),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="r <= hidden",
            when="orthogonality",
            where="projection",
            error="Malformed",
            meaning="projection has more rows than columns, so its rows cannot be orthonormal",
        ),
    )

    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(require="hidden == out", meaning="the adapter was made for another number of channels"),
        Rule(require="kernel == 0", meaning="a convolution has no axis of positions"),
    )

    source: Tensor = tensor("r hidden")
    source_bias: Tensor | None = tensor("r", optional=True)
    projection: Tensor = tensor("r hidden")
    suffix_source: Tensor | None = tensor("r hidden", optional=True)
    suffix_source_bias: Tensor | None = tensor("r", optional=True)
    suffix_projection: Tensor | None = tensor("r hidden", optional=True)
    prefix_positions: int = attribute(3, least=0)
    suffix_positions: int = attribute(0, least=0)
    subtract_projection: bool = True
    non_linearity: str = attribute("linear", among=ACTIVATIONS)
    orthogonality: bool = False

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        projection, subtract = orthonormal_rows(random((rank, len(W)))), attributes.get("subtract_projection", True)
        source = projection if subtract else W.new_zeros(rank, len(W))
        attributes = {"orthogonality": bool(subtract)} | attributes
        return cls.from_fields(
            source=source.clone(), source_bias=W.new_zeros(rank), projection=projection, **attributes
        )

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        tied = self.source, self.source_bias, self.projection
        suffix = self.suffix_source, self.suffix_source_bias, self.suffix_projection
        last = tied if self.suffix_source is None else suffix
        counts = self.prefix_positions, self.suffix_positions
        return changed_at_ends(
            layer(x), layer, counts, lambda h: self._changed(h, *tied), lambda h: self._changed(h, *last)
        )

    def _changed(self, h: Tensor, source: Tensor | None, bias: Tensor | None, projection: Tensor | None) -> Tensor:
        assert source is not None
        assert projection is not None
        R = orthonormal_rows(projection) if self.orthogonality else projection
        hidden = h @ source.mT if bias is None else h @ source.mT + bias
        wanted = ACTIVATIONS[self.non_linearity](hidden)
        return h + (wanted - h @ R.mT if self.subtract_projection else wanted) @ R


# Functions that change only the first and last positions of a sequence, counted as in `ReFT`.


TensorFunction = Callable[["Tensor"], "Tensor"]


def changed_at_ends(
    y: Tensor, layer: Layer, counts: tuple[int, int], first: TensorFunction, last: TensorFunction
) -> Tensor:
    """Apply `first` at the first positions of y `[..., positions, channels]` and `last` at the last positions.

    `counts` is a pair: the number of first positions, and the number of last positions. If the model is called with a
    mask `[rows, positions]`, only unmasked positions count.
    """
    mask: Any = (getattr(layer, "call", None) or {}).get("attention_mask")
    if getattr(mask, "ndim", 0) == 2 and tuple(mask.shape) == tuple(y.shape[:-1]):
        changed: Tensor = _masked(y, mask, counts, first, last)
        return changed
    begin, end = counts
    # Slice relative to the end, because the length of a sequence is unknown in an exported graph.
    before = y[..., :-end, :] if end else y
    behind = y[..., -end:, :] if end else y[..., :0, :]
    parts = [first(before[..., :begin, :]), before[..., begin:, :], last(behind)]
    joined: Tensor = namespace(y).concat(parts, axis=-2)
    return joined


def _masked(y: Tensor, mask: Tensor, counts: tuple[int, int], first: TensorFunction, last: TensorFunction) -> Tensor:
    xp, real = namespace(y), (mask != 0) * 1
    place = (real * 0 + 1).cumsum(-1) - 1 - real.argmax(-1)[:, None]
    left = real.sum(-1)[:, None] - place
    begun = xp.where(((place >= 0) & (place < counts[0]))[..., None], first(y), y)
    return xp.where(((left > 0) & (left <= counts[1]))[..., None], last(y), begun)
