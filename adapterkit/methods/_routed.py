"""What routed laws share: a mix of low-rank changes whose shares depend on more than the weight. No method itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..tensors.activations import softmax
from ..tensors.namespace import namespace
from ..updates import OutputUpdate

if TYPE_CHECKING:
    from torch import Tensor


class Routed(OutputUpdate):
    """A change of a linear layer's output; a subclass has the axes `out` and `in`."""

    linear_only = True

    @property
    def channels(self) -> int | None:
        return cast(int, self.dims()["out"])


def mixed(x: Any, shares: Any, A: Tensor, B: Tensor, layer: Any) -> Any:
    """The sum over e of shares[..., e] * B[e] @ A[e] @ x, for A `[experts, r, in]` and B `[experts, out, r]`."""
    experts, r, inputs = A.shape
    h = layer.mix(x, A.reshape(experts * r, inputs))
    h = h.reshape(*h.shape[:-1], experts, r) * shares[..., None]
    return layer.mix(h.reshape(*h.shape[:-2], experts * r), B.swapaxes(0, 1).reshape(-1, experts * r))


def best(scores: Any, count: int) -> Any:
    """Which entries are among the `count` largest of the last axis; of equal ones the first."""
    xp = namespace(scores)
    return xp.argsort(xp.argsort(-scores, axis=-1), axis=-1) < count


def softmax_among(scores: Any, chosen: Any) -> Any:
    """Shares along the last axis for the chosen entries, which add up to 1; 0 for the others."""
    xp = namespace(scores)
    return xp.where(chosen, softmax(xp.where(chosen, scores, -xp.inf)), 0.0)
