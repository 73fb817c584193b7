"""Gates of AdapterHub's kind: one share for each row of a batch, by what stands in it.  No method itself.

Mao et al. 2021, https://arxiv.org/abs/2110.07577
"""

from __future__ import annotations

from typing import Any

from ..tensors.activations import sigmoid


def row_shares(logits: Any, channel: int = -1) -> Any:
    """The mean of sigmoid(logits) over all axes but the rows' and that of the channels, which stay."""
    channel %= logits.ndim
    places = tuple(axis for axis in range(1, logits.ndim) if axis != channel)
    shares = sigmoid(logits)
    return shares.mean(places, keepdims=True) if places else shares


def gated(P: Any, x: Any, gate: Any, bias: Any) -> Any:
    """Keys and values `[1, 2, heads, n, d]` times the shares of the rows of x, `[batch, m, width]`.

    One share is for both, two are for keys and for values: `[batch, 2, heads, n, d]`.
    """
    return P * row_shares(x @ gate.mT + bias).swapaxes(1, 2)[..., None, None]
