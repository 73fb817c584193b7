"""Base class of methods whose change is a low-rank product B @ A, computed from the fields and the weight's shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.updates import Additive, of_pair
from ..errors import NotMergeable
from ..linalg.namespace import namespace
from ..linalg.products import product

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class LowRank(Additive):
    """W' = W + B @ A. Subclasses compute both factors in `pair`."""

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return B `[out, r]` and A `[r, in * k]`, scaled, for a weight of `shape` = `[out, in, *k]`."""
        raise NotMergeable(f"{self.method} has no formula")

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        B, A = self.pair(shape)
        return (B @ A).reshape(shape)

    def delta_into(self, D: Tensor, weight: float) -> None:
        if D.ndim == 2:
            B, A = self.pair(tuple(D.shape))
            product(D, weight * B, A)
        else:
            super().delta_into(D, weight)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        B, A = self.pair(shape)
        return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        B, A = self.pair(layer.shape)
        return layer(x) + layer.mix(layer.op(x, A.reshape(len(A), *layer.shape[1:])), B)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Place blocks `[n, rows, columns]` on the diagonal of a matrix `[n * rows, n * columns]`."""
    n, rows, columns = blocks.shape
    identity = namespace(blocks).eye(n, dtype=blocks.dtype, device=getattr(blocks, "device", None))
    return (blocks[:, :, None, :] * identity[:, None, :, None]).reshape(n * rows, n * columns)
