"""Updates of weights and biases: additive ones, and those whose formula reads the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from ...errors import NotMergeable
from .update import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .layer import Layer

_Function = TypeVar("_Function")


def of_pair(forward: _Function) -> _Function:
    """Mark a `forward` that computes layer(x) + mix(op(x, A), B) + d, with A and B of `pair` and d of `bias_delta`.

    Backends may then compute the pair by a faster path. A method that overrides `forward` loses the mark, so a formula
    that depends on the tokens is never mistaken for a plain pair.
    """
    forward.of_pair = True  # type: ignore[attr-defined]
    return forward


class Additive(Update):
    """W' = W + D, b' = b + d, where D and d do not depend on W.

    Class attributes:
        thin: True if `forward` equals the low-rank path of `pair`; see `of_pair`.
    """

    kind = "additive"
    thin: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.thin = getattr(cls.forward, "of_pair", False)

    @property
    def changes_weight(self) -> bool:
        return True

    def delta(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return D for a weight of `shape` = `[out, in, *k]`."""
        raise NotMergeable(f"{self.method} has no formula")

    def bias_delta(self) -> torch.Tensor | None:
        """Return d `[out]`, or None if the bias does not change."""
        return None

    def pair(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return B `[out, r]` and A `[r, in * k]` with D = B @ A if the formula is such a product; else None."""
        return None

    def factors(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return B, A and s with D = s * B @ A, like `pair`; a method overrides it to keep its scaling out of B."""
        pair = self.pair(shape)
        return None if pair is None else (*pair, 1.0)

    def scaled(self, weight: float) -> Self | None:
        """Return the same method with weight * D and weight * d, without reading leaves; None if it cannot."""
        scaling = self.attributes.get("scaling")
        return None if scaling is None else self.replace(scaling=weight * scaling)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        """Return the Frobenius norm of D; a method overrides it if it can do so without forming D."""
        D = self.delta(shape)
        return math.sqrt(float((D * D).sum()))

    def delta_into(self, D: torch.Tensor, weight: float) -> None:
        """Write weight * D into an array of the weight's shape; a method overrides it to avoid a copy."""
        D[...] = weight * self.delta(tuple(D.shape))

    def new_weight(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta(tuple(W.shape))

    def new_bias(self, b: torch.Tensor) -> torch.Tensor:
        d = self.bias_delta()
        return b if d is None else b + d

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        d = self.bias_delta()
        y = layer(x) + layer.op(x, self.delta(layer.shape)) if self.changes_weight else layer(x)
        return y if d is None else y + layer.per_channel(d)


class WeightUpdate(Update):
    """W' = f(W), b' = g(b)."""

    kind = "weight"

    @property
    def changes_weight(self) -> bool:
        return True

    @classmethod
    def mixed(cls, updates: Sequence[Self], weights: Sequence[float]) -> Self | None:
        """Return one update with the change sum_i weights[i] * (f_i(W) - W) for any weight, and likewise for the bias.

        Args:
            updates: updates of this method, with tensors loaded.
            weights: one per update.

        Returns:
            None if the method cannot express it.
        """
        return None

    def scaled_factors(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return s `[out]`, B `[out, r]` and A `[r, in * k]` with W' = s[:, None] * (W + B @ A) and b' = b, or None.

        Gradients flow through s, B and A as through `new_weight`; W is a constant.
        """
        return None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y = layer.op(x, self.new_weight(layer.weight))
        settled = self.settled(layer.weight) if self.bias_sees_weight else self
        return y if layer.bias is None else y + layer.per_channel(settled.new_bias(layer.bias))
