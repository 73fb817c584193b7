"""Read and change the weights of recurrent layers (RNN, GRU, LSTM).

A single node has the weights and biases of all gates and directions, and computes all steps of the recurrence. Each
step uses the weights, so nodes that are added after the recurrent node cannot correct its output for a changed weight.
Therefore new nodes compute the changed weight, and the recurrent node reads the changed weight.

The order of the gates differs: torch has `r z n` for GRU and `i f g o` for LSTM; ONNX has `z r h` and `i o f c`. The
adapters' formulas get weights and biases in torch's order.
https://onnx.ai/onnx/operators/onnx__LSTM.html
https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Array, element_type
from .layers import GraphLayer, weight_at
from .operands import attribute, detached_copy, is_constant, numbers, shape_of
from .values import Value, concatenated

BIASES = 3
"""The position of the biases among the inputs of a recurrent node."""

GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}
"""A map from each operator to a list of its gates in ONNX's order. Each gate is given by its index in torch's order."""

GATES_BACK = {op: tuple(int(at) for at in np.argsort(order)) for op, order in GATES.items()}
"""A map from each operator to a list of its gates in torch's order. Each gate is given by its index in ONNX's order."""

_CALL = re.compile(r"/(?:GRU|LSTM|RNN)(?:_(\d+))?$")


class Recurrent(GraphLayer):
    """One of the weights of a recurrent layer, with its bias.

    The layer has up to four weights: one for the inputs and one for the hidden state, in each direction. `Recurrent`
    is the weight for the inputs in the forward direction; each subclass is one of the other three weights. The weight
    is `[gates * hidden, in]`, and the bias is `[gates * hidden]`.

    Class attributes:
        direction: the index of the direction in the node's stacked tensors.
        part: `ih` for the inputs, `hh` for the hidden state, as in torch's `weight_ih_l0` and `weight_hh_l0`.
    """

    inside = True
    direction: ClassVar[int] = 0
    part: ClassVar[str] = "ih"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        given = weight_at(node, cls.position) if len(node.inputs) > cls.position else None
        known = node.op_type in GATES and node.domain in ("", "ai.onnx") and is_constant(given)
        # The weight's first axis is the number of directions; a unidirectional layer has only one.
        return known and given is not None and cls.direction < shape_of(given)[0]

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @classmethod
    def stored_shape(cls, node: ir.Node) -> tuple[int, ...]:
        return super().stored_shape(node)[1:]

    @classmethod
    def stored_array(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        copy, order = detached_copy(cls.operand_of(node)), GATES_BACK[node.op_type]
        return lambda: _reordered(numbers(copy)[cls.direction], order)

    @property
    def weight(self) -> Value:
        make, rows = self.detached(self.node), self._stacked()[self.direction]
        return Value(self.branch, rows.shape, rows.dtype, self._ordered(rows, GATES_BACK).value, make)

    def back(self, W: Value) -> Value:
        stacked = self._stacked()
        return self._placed(self._ordered(W, GATES), stacked)

    @property
    def constant_bias(self) -> ir.Value | None:
        """The biases of the node, `[directions, 2 * gates * hidden]`; None if the node has no biases.

        Each row has first the biases for the inputs, then the biases for the hidden state.

        Raises:
            Unsupported: the biases depend on the graph's inputs.
        """
        bias = weight_at(self.node, BIASES) if self.has_bias else None
        if bias is not None and not is_constant(bias):
            why = f"the bias of the {self.node.op_type} depends on the graph's inputs"
            raise Unsupported(why, where=self.node.name, cure="Export the model with constant biases")
        return bias

    @property
    def has_bias(self) -> bool:
        return len(self.node.inputs) > BIASES and self.node.inputs[BIASES] is not None

    @property
    def bias(self) -> Value | None:
        bias = self.constant_bias
        if bias is None:
            return None
        make, rows = self.detached_bias(self.node, bias), self._halves()[self.bias_half()]
        return Value(self.branch, rows.shape, rows.dtype, self._ordered(rows, GATES_BACK).value, make)

    def back_bias(self, b: Value) -> Value:
        new, halves = self._ordered(b, GATES), self._halves()
        pair = concatenated([new, halves[1]] if self.part == "ih" else [halves[0], new], 0)
        return self._placed(pair, self._biases())

    @classmethod
    def bias_half(cls) -> int:
        """Return which half of each row of biases this class uses: 0 (for the inputs) or 1 (for the hidden state)."""
        return ("ih", "hh").index(cls.part)

    @classmethod
    def detached_bias(cls, node: ir.Node, bias: ir.Value) -> Callable[[], Array]:
        """Return a function that returns this class's bias, with the gates in torch's order.

        The graph may change before the function is called. The function still returns the bias from before the change.
        """
        copy, order = detached_copy(bias), GATES_BACK[node.op_type]
        return lambda: _reordered(np.split(numbers(copy)[cls.direction], 2)[cls.bias_half()], order)

    @classmethod
    def changed_bias(cls, node: ir.Node, bias: ir.Value, f: Callable[[Array], Array]) -> Callable[[], Array]:
        """Return a function that applies `f` to this class's bias, and returns the biases of all directions."""
        copy, order, back = detached_copy(bias), GATES[node.op_type], GATES_BACK[node.op_type]

        def make() -> Array:
            stacked: Array = numbers(copy).astype(np.float64)
            half = np.split(stacked[cls.direction], 2)[cls.bias_half()]  # A view, so writing to it changes `stacked`.
            half[:] = _reordered(f(_reordered(half, back)), order)
            return stacked

        return make

    def _halves(self) -> tuple[Value, Value]:
        both, size = self._biases()[self.direction], self.shape[0]
        return both[:size], both[size:]

    def _biases(self) -> Value:
        """Return the biases that the node reads now. They may already include another target's change."""
        biases = self.node.inputs[BIASES]
        return Value(self.branch, (self._directions(), 2 * self.shape[0]), element_type(biases), biases)

    def _placed(self, new: Value, stacked: Value) -> Value:
        """Return `stacked` with `new` as this direction's entry. `stacked` has one entry for each direction."""
        pieces = [new[None] if at == self.direction else stacked[at : at + 1] for at in range(stacked.shape[0])]
        return pieces[0] if len(pieces) == 1 else concatenated(pieces, 0)

    def _directions(self) -> int:
        return 1 + (attribute(self.node, "direction", "forward") == "bidirectional")

    def _stacked(self) -> Value:
        """Return the weights of all directions as one value: the weights that the node reads now.

        They may already include another target's change.
        """
        weights = self.node.inputs[self.position]
        return Value(self.branch, (self._directions(), *self.shape), element_type(weights), weights)

    def _ordered(self, W: Value, orders: Mapping[str, Sequence[int]]) -> Value:
        order = orders[self.node.op_type]
        size = self.shape[0] // len(order)
        return concatenated([W[gate * size : (gate + 1) * size] for gate in order], 0)

    @classmethod
    def changed(cls, node: ir.Node, f: Callable[[Array], Array]) -> Callable[[], Array]:
        """Return a function that applies `f` to this direction's weight, and returns the weights of all directions."""
        copy, order, back = detached_copy(cls.operand_of(node)), GATES[node.op_type], GATES_BACK[node.op_type]

        def make() -> Array:
            stacked: Array = numbers(copy).astype(np.float64)
            W = _reordered(stacked[cls.direction], back)
            stacked[cls.direction] = _reordered(f(W), order)
            return stacked

        return make

    @classmethod
    def name(cls, node: ir.Node) -> str | None:
        """Return the weight's name in torch, such as `gru.weight_ih_l0`; None if the node has no module path."""
        match = _CALL.search(node.name or "")
        if match is None or not (node.name or "").startswith("/"):
            return None
        module = _CALL.sub("", node.name or "").strip("/").replace("/", ".")
        back = "_reverse" if cls.direction else ""
        return f"{module}.weight_{cls.part}_l{match.group(1) or 0}{back}".lstrip(".")


def _reordered(W: Array, order: Sequence[int]) -> Array:
    gates: Array = W.reshape(len(order), -1)[list(order)]
    return gates.reshape(W.shape)


class InputsBack(Recurrent):
    """The weight for the inputs in the backward direction."""

    direction = 1


class Hidden(Recurrent):
    """The weight for the hidden state in the forward direction."""

    part, position = "hh", 2


class HiddenBack(Hidden):
    """The weight for the hidden state in the backward direction."""

    direction = 1


RECURRENT: tuple[type[Recurrent], ...] = (Recurrent, InputsBack, Hidden, HiddenBack)
