"""AdapterHub's gates: a factor for each row of a batch, computed from the row's input.

Mao et al. 2021, https://arxiv.org/abs/2110.07577
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..linalg.activations import sigmoid
from ..linalg.namespace import namespace

if TYPE_CHECKING:
    from torch import Tensor


def row_shares(logits: Tensor, channel: int = -1) -> Tensor:
    """Return the mean of sigmoid(logits) over all axes except rows and channels."""
    channel %= logits.ndim
    places = tuple(axis for axis in range(1, logits.ndim) if axis != channel)
    shares = sigmoid(logits)
    return namespace(shares).mean(shares, axis=places, keepdims=True) if places else shares


def gated(P: Tensor, x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """Multiply keys and values `[1, 2, heads, n, d]` by the gates of the rows of x, `[batch, m, width]`.

    A gate computes one factor for both keys and values, or one for each. The result is `[batch, 2, heads, n, d]`.
    """
    return P * row_shares(x @ gate.mT + bias).swapaxes(1, 2)[..., None, None]
