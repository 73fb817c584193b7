"""A recurrent layer over one sequence, step by step: Hochreiter and Schmidhuber's LSTM.  No method itself.

Gates are rows of the weights, in the order of input, forget, cell and output, as torch.nn.LSTM has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..linalg.activations import sigmoid
from ..linalg.namespace import namespace


def both_ways(x: Any, weights: Any, hidden: Any, bias: Any, hidden_bias: Any) -> Any:
    """Return a bidirectional layer's outputs `[n, 2 * hidden]` for its inputs `[n, width]`.

    The first axis of every argument but x is the direction.
    """
    ahead = _one_way(x, range(len(x)), weights[0], hidden[0], bias[0] + hidden_bias[0])
    back = _one_way(x, reversed(range(len(x))), weights[1], hidden[1], bias[1] + hidden_bias[1])
    return namespace(x).concat([ahead, back], axis=-1)


def _one_way(x: Any, order: Iterable[int], weights: Any, hidden: Any, bias: Any) -> Any:
    xp, size = namespace(x), hidden.shape[-1]
    read = x @ weights.mT + bias
    h = c = 0 * bias[:size]
    found = {}
    for token in order:
        gates = read[token] + hidden @ h
        i, f, g, o = (gates[start : start + size] for start in range(0, 4 * size, size))
        c = sigmoid(f) * c + sigmoid(i) * xp.tanh(g)
        h = found[token] = sigmoid(o) * xp.tanh(c)
    return xp.stack([found[token] for token in range(len(x))])
