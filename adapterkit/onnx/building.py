"""Collect what an injection adds to a graph: nodes in order, each tensor once, unique names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import Malformed
from .sizes import FREE

Array = np.ndarray[Any, Any]

OPSET = 13
"""The oldest opset whose operator forms are written; older models are converted to it first."""


class Building:
    """Everything new in one model. Tensors are created once per source object and shared.

    Args:
        model: the model that is being changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = model.graph.opset_imports.get("", OPSET)
        self.taken = {value.name for graph in model.graphs() for value in _values(graph)}
        self.taken |= {node.name for graph in model.graphs() for node in graph}
        self.tensors: dict[Any, ir.Value] = {}
        self.kept: list[Any] = []
        self.inputs: list[ir.Value] = []
        self.moved: dict[ir.Value, ir.Value] = {}

    def now(self, value: ir.Value) -> ir.Value:
        """Return the value that now stands in place of a value of the original graph."""
        # A value may have been replaced several times, by several targets in a row.
        while value in self.moved:
            value = self.moved[value]
        return value

    def name(self, wanted: str) -> str:
        """Return a unique name: the wanted one, with a number if it is taken."""
        name, count = wanted, 0
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name

    def tensor(self, key: Any, wanted: str, make: Callable[[], Array]) -> ir.Value:
        """Return the initializer made from `key`. `settle` registers it with the graph if a node reads it."""
        if key not in self.tensors:
            array = np.asarray(make(), order="C")  # `ascontiguousarray` would turn a scalar into shape [1].
            name = self.name(wanted)
            tensor = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype), name=name)
            self.tensors[key] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.tensors[key]

    def literal(self, array: Array) -> ir.Value:
        """Return the initializer that holds a small array."""
        return self.tensor(
            ("literal", array.dtype.str, array.shape, array.tobytes()), "adapterkit.constant", lambda: array
        )

    def slot(self, key: Any, wanted: str, default: Array, shape: Sequence[int | str]) -> ir.Value:
        """Return an overridable input: an initializer (its default) that is also listed as a graph input."""
        if key not in self.tensors:
            value = self.tensor(key, wanted, lambda: default)
            # The default has size 0 or 1 on open axes, so the declared shape must be open instead.
            value.shape = ir.Shape(shape)
            self.inputs.append(value)
        return self.tensors[key]

    def keep(self, thing: Any) -> int:
        """Return the `id` of an object, and keep the object alive so that the id is not reused."""
        self.kept.append(thing)
        return id(thing)

    def settle(self) -> None:
        """Register new tensors that nodes read with the graph, and overridable inputs with its inputs."""
        for value in self.tensors.values():
            if value.uses() and not value.is_initializer():
                self.model.graph.register_initializer(value)
        self.model.graph.inputs.extend(value for value in self.inputs if value.uses())
        self.model.ir_version = max(self.model.ir_version or 0, 4)  # Before IR 4, initializers had to be inputs too.


class Branch:
    """The nodes of one target, in order, before they are inserted into its graph.

    Args:
        building: collects what the model gets.
        name: the prefix of the nodes' names.
    """

    def __init__(self, building: Building, name: str) -> None:
        self.building, self.name = building, name
        self.nodes: list[ir.Node] = []

    @property
    def opset(self) -> int:
        return self.building.opset

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None, dtype: Any, shape: Any,
        position: int = 0,
    ) -> ir.Value:  # fmt: skip
        """Append a node; return its output at `position`, the only one that is read."""
        name = self.building.name(f"{self.name}/{op}")
        out = ir.Value(name=f"{name}_output", type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))
        # A size of FREE or more stands for an open one and must not reach the file.
        if shape is not None and all(size is not None and size < FREE for size in shape):
            out.shape = ir.Shape(shape)
        outputs = [*(ir.Value(name=f"{name}_unread_{at}") for at in range(position)), out]
        typed = {key: _typed(key, value) for key, value in (attributes or {}).items()}
        self.nodes.append(ir.node(op, inputs, typed, outputs=outputs, name=name))
        return out

    def back_to(self, count: int) -> None:
        """Remove the nodes after the first `count`."""
        _disconnect(self.nodes[count:])
        del self.nodes[count:]

    def waiting(self, results: Iterable[ir.Value]) -> list[ir.Node]:
        """Return the nodes that the results need and that are in no graph yet, in order."""
        wanted, needed = set(results), []
        for node in reversed(self.nodes):
            if any(out in wanted for out in node.outputs):
                needed.append(node)
                wanted.update(value for value in node.inputs if value is not None)
        return [node for node in reversed(needed) if node.graph is None]

    def close(self) -> None:
        """Release the nodes; disconnect those that were inserted nowhere, so that they count as no readers."""
        _disconnect([node for node in self.nodes if node.graph is None])
        self.nodes.clear()


KEEPS_TYPE = frozenset({"Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Concat", "Gather", "Mul"})
"""Operators whose output has the element type of their first input."""


def element_type(value: ir.Value | None) -> np.dtype[Any]:
    """Return the numpy dtype of a value, following producers if the graph does not say; float32 as a last resort."""
    while value is not None:
        held = value.const_value.dtype if value.dtype is None and value.const_value is not None else value.dtype
        if held is not None and held not in _UNKNOWN:
            return held.numpy()
        node = value.producer()
        if node is not None and node.op_type == "Cast":
            return _cast_to(node)
        dequantized = node is not None and node.op_type == "DequantizeLinear"
        value = (
            node.inputs[int(dequantized)] if node is not None and (dequantized or node.op_type in KEEPS_TYPE) else None
        )
    return np.dtype(np.float32)


def _cast_to(node: ir.Node) -> np.dtype[Any]:
    to = node.attributes["to"].as_int()
    try:
        return ir.DataType(to).numpy()
    except (TypeError, ValueError):
        raise Malformed(f"a Cast to the unknown type {to}", where=node.name, cure="Export the model again") from None


_UNKNOWN = (ir.DataType.UNDEFINED, ir.DataType.STRING)


def kind_of(value: ir.Value) -> ir.DataType:
    """Return `element_type` as an ONNX data type."""
    return ir.DataType.from_numpy(element_type(value))


def _typed(name: str, value: Any) -> Any:
    """Return an attribute in the form that `ir.node` takes.

    For a list of integers, onnx-ir checks each of its protocols before it finds the type. That took a quarter of the
    time of an injection, so the type is given here.
    """
    whole = isinstance(value, list | tuple) and bool(value) and {*map(type, value)} == {int}
    return ir.AttrInt64s(name, value) if whole else value


def _disconnect(nodes: Sequence[ir.Node]) -> None:
    for node in reversed(nodes):
        for position in range(len(node.inputs)):
            node.replace_input_with(position, None)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
