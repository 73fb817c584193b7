"""Recurrent layers: one tensor has the weights of all gates and directions. Merges can change it, branches cannot.

The order of gates differs: torch has r z n for GRU and i f g o for LSTM, ONNX has z r h and i o f c. Weights are shown
in torch's order. https://onnx.ai/onnx/operators/onnx__LSTM.html
https://pytorch.org/docs/stable/generated/torch.nn.LSTM.html
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from .building import Array
from .layers import Layer
from .operands import held_apart, is_constant, numbers, shape_of

GATES = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}
"""Operator -> for each of ONNX's gates, its position in torch's order."""

_CALL = re.compile(r"/(?:GRU|LSTM|RNN)(?:_(\d+))?$")


class Recurrent(Layer):
    """One direction's weight `[gates * hidden, in]`, for the inputs or the hidden state.

    Class attributes:
        direction: which of the stacked directions.
        part: torch's name of the weight.
    """

    merge_only = True
    direction: ClassVar[int] = 0
    part: ClassVar[str] = "ih"

    @classmethod
    def takes(cls, node: ir.Node) -> bool:
        given = node.inputs[cls.position] if len(node.inputs) > cls.position else None
        known = node.op_type in GATES and node.domain in ("", "ai.onnx") and is_constant(given)
        # A unidirectional layer stacks only one direction.
        return known and cls.direction < shape_of(node.inputs[cls.position])[0]  # type: ignore[arg-type]

    @classmethod
    def turns(cls, node: ir.Node) -> bool:
        return False

    @classmethod
    def held_shape(cls, node: ir.Node) -> tuple[int, ...]:
        return super().held_shape(node)[1:]

    @classmethod
    def held(cls, node: ir.Node) -> Array:
        return cls.detached(node)()

    @classmethod
    def detached(cls, node: ir.Node) -> Callable[[], Array]:
        # argsort inverts the permutation: from ONNX's order back to torch's.
        copy, order = held_apart(cls.operand_of(node)), np.argsort(GATES[node.op_type])
        return lambda: _reordered(numbers(copy)[cls.direction], order)

    @classmethod
    def changed(cls, node: ir.Node, f: Callable[[Array], Array]) -> Callable[[], Array]:
        """Return a function that computes the stacked tensor, with this direction's weight changed by `f`."""
        copy, order = held_apart(cls.operand_of(node)), np.array(GATES[node.op_type])

        def make() -> Array:
            stacked: Array = numbers(copy).astype(np.float64)
            W = _reordered(stacked[cls.direction], np.argsort(order))
            stacked[cls.direction] = _reordered(f(W), order)
            return stacked

        return make

    @classmethod
    def name(cls, node: ir.Node) -> str | None:
        """Return torch's name of the weight, from the node's path."""
        found = _CALL.search(node.name or "")
        if found is None or not (node.name or "").startswith("/"):
            return None
        module = _CALL.sub("", node.name or "").strip("/").replace("/", ".")
        back = "_reverse" if cls.direction else ""
        return f"{module}.weight_{cls.part}_l{found.group(1) or 0}{back}".lstrip(".")


def _reordered(W: Any, order: Any) -> Array:
    gates: Array = W.reshape(len(order), -1, W.shape[-1])[order]
    return gates.reshape(W.shape)


class InputsBack(Recurrent):
    """The weight of the inputs, backward direction."""

    direction = 1


class Hidden(Recurrent):
    """The weight of the hidden state."""

    part, position = "hh", 2


class HiddenBack(Hidden):
    """The weight of the hidden state, backward direction."""

    direction = 1


RECURRENT: tuple[type[Recurrent], ...] = (Recurrent, InputsBack, Hidden, HiddenBack)
