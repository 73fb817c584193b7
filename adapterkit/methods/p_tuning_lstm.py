"""P-tuning with an LSTM: a prompt computed by a recurrent network.

Liu et al. 2021, https://arxiv.org/abs/2103.10385

This is PEFT's `encoder_reparameterization_type="LSTM"`. PEFT's files store only the network's output, so they are read
as the method `prompt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..core.updates import ContextUpdate, tensor
from ..linalg.activations import sigmoid
from ..linalg.namespace import namespace
from .prompt import tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class PTuningLSTM(ContextUpdate):
    """Puts MLP(LSTM(E)) in front of the embeddings of the input.

    The LSTM is bidirectional and may have several layers. The MLP is two linear layers with a ReLU between them. In
    each LSTM layer's tensors, the first axis is the direction (forward, backward). Rows are ordered by gate: input,
    forget, cell, output, as in torch.nn.LSTM.
    """

    place = "embeddings"
    paper = "https://arxiv.org/abs/2103.10385"
    forms: ClassVar[Any] = (((), ("deeper_input", "deeper_hidden", "deeper_input_bias", "deeper_hidden_bias")),)

    E: Tensor = tensor("n width")
    first_input: Tensor = tensor("2 4*hidden width")
    first_hidden: Tensor = tensor("2 4*hidden hidden")
    first_input_bias: Tensor = tensor("2 4*hidden")
    first_hidden_bias: Tensor = tensor("2 4*hidden")
    deeper_input: Tensor | None = tensor("layers 2 4*hidden 2*hidden", optional=True)
    deeper_hidden: Tensor | None = tensor("layers 2 4*hidden hidden", optional=True)
    deeper_input_bias: Tensor | None = tensor("layers 2 4*hidden", optional=True)
    deeper_hidden_bias: Tensor | None = tensor("layers 2 4*hidden", optional=True)
    W1: Tensor = tensor("2*hidden 2*hidden")
    b1: Tensor = tensor("2*hidden")
    W2: Tensor = tensor("dim 2*hidden")
    b2: Tensor = tensor("dim")

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        hidden: int | None = None,
        layers: int = 2,
        index: Sequence[int] | None = None,
        **attributes: object,
    ) -> Self:
        dim, hidden = len(W), len(W) if hidden is None else hidden
        both, gates, scale = 2 * hidden, 4 * hidden, hidden**-0.5
        shapes = {"input": (2, gates, dim), "hidden": (2, gates, hidden), "input_bias": (2, gates)}
        shapes["hidden_bias"] = shapes["input_bias"]
        drawn = {f"first_{name}": random(shape) * scale for name, shape in shapes.items()}
        if layers > 1:
            deeper = {**shapes, "input": (2, gates, both)}
            drawn |= {f"deeper_{name}": random((layers - 1, *shape)) * scale for name, shape in deeper.items()}
        head = {"W1": random((both, both)) / both**0.5, "b1": W.new_zeros(both), "b2": W.new_zeros(dim)}
        E = tokens_of(W, rank, random, index)
        return cls.from_fields(E=E, **drawn, **head, W2=random((dim, both)) / both**0.5, **attributes)

    def embeddings(self, task: Tensor | int | None = None) -> Tensor:
        xp = namespace(self.E)
        h = both_ways(self.E, *self._layer("first"))
        for layer in range(0 if self.deeper_input is None else len(self.deeper_input)):
            h = both_ways(h, *(each[layer] for each in self._layer("deeper")))
        h = h @ self.W1.mT + self.b1
        out: Tensor = xp.where(h > 0, h, 0 * h) @ self.W2.mT + self.b2
        return out

    def _layer(self, which: str) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"{which}_{name}") for name in ("input", "hidden", "input_bias", "hidden_bias"))


# Hochreiter and Schmidhuber's LSTM layer, computed step by step over one sequence.
#
# The rows of the weights are ordered by gate: input, forget, cell, output, as in torch.nn.LSTM.


def both_ways(x: Tensor, weights: Tensor, hidden: Tensor, bias: Tensor, hidden_bias: Tensor) -> Tensor:
    """Return the outputs `[n, 2 * hidden]` of a bidirectional LSTM layer for the inputs x `[n, width]`.

    The first axis of all other arguments is the direction.
    """
    ahead = _one_way(x, range(len(x)), weights[0], hidden[0], bias[0] + hidden_bias[0])
    back = _one_way(x, reversed(range(len(x))), weights[1], hidden[1], bias[1] + hidden_bias[1])
    return namespace(x).concat([ahead, back], axis=-1)


def _one_way(x: Tensor, order: Iterable[int], weights: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    xp, size = namespace(x), hidden.shape[-1]
    read = x @ weights.mT + bias
    h = c = 0 * bias[:size]
    states = {}
    for token in order:
        gates = read[token] + hidden @ h
        i, f, g, o = (gates[start : start + size] for start in range(0, 4 * size, size))
        c = sigmoid(f) * c + sigmoid(i) * xp.tanh(g)
        h = states[token] = sigmoid(o) * xp.tanh(c)
    return xp.stack([states[token] for token in range(len(x))])
