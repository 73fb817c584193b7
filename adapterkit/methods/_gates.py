"""Gates of AdapterHub's kind: one share for each row of a batch, by what stands in it.  No method itself.

Mao et al. 2021, https://arxiv.org/abs/2110.07577
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import Malformed
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


def check_gates(shape: Sequence[int]) -> None:
    """Checks that a prefix has one gate, or one for keys and one for values.

    Raises:
        Malformed: it has more.
    """
    if len(shape) == 2 and shape[0] not in (1, 2):
        why = f"{shape[0]} gates for keys and values"
        raise Malformed(why, where="gate", cure="One is for both, or each has its own")
