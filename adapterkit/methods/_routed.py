"""Base class of routed methods, which add several low-rank changes, weighted by shares that depend on the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..core.updates import OutputUpdate
from ..linalg.activations import softmax
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class Routed(OutputUpdate):
    """Changes the output of a linear layer. The tensors of subclasses have the axes `out` and `in`."""

    linear_only = True

    @property
    def channels(self) -> int | None:
        return cast(int, self.dims()["out"])


def mixed(x: Tensor, shares: Tensor, A: Tensor, B: Tensor, layer: Layer) -> Tensor:
    """Return `sum_e shares[..., e] * B[e] @ A[e] @ x`, for A `[experts, r, in]` and B `[experts, out, r]`."""
    experts, r, inputs = A.shape
    h = layer.mix(x, A.reshape(experts * r, inputs))
    h = h.reshape(*h.shape[:-1], experts, r) * shares[..., None]
    return layer.mix(h.reshape(*h.shape[:-2], experts * r), B.swapaxes(0, 1).reshape(-1, experts * r))


def best(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest entries along the last axis. Among equal entries, the first are chosen."""
    xp = namespace(scores)
    return xp.argsort(xp.argsort(-scores, axis=-1), axis=-1) < count


def softmax_among(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return the softmax of the chosen scores along the last axis, and 0 for all other scores."""
    xp = namespace(scores)
    return xp.where(chosen, softmax(xp.where(chosen, scores, -xp.inf)), 0.0)
