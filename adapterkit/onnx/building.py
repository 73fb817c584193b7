"""Add nodes and tensors to a graph under unique names, create each new tensor only once, and copy nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import Malformed, Unsupported

if TYPE_CHECKING:
    import numpy.typing as npt

Array = np.ndarray[Any, Any]

Dtype = np.dtype[np.generic]

Attribute = str | int | float | Sequence[int] | Sequence[float] | ir.TensorProtocol | ir.Attr
"""The value of a node's attribute."""

OPSET = 13
"""The oldest opset that the added nodes support; models of an older opset are first converted to this one."""

GENERATED = re.compile(r"(gemm_input_shape|gemm_output_shape|const_transpose_optimizer|_token_\d+)$")
"""Matches the names that onnxruntime's optimizers give to the shape and permutation tensors that they add."""

INLINE = 1024
"""New tensors of up to this many bytes are stored in the model's file."""

FREE = 1 << 40
"""Sizes of at least `FREE` are placeholders for dynamic sizes, which are only known once an adapter is loaded; see
slots.py."""


class Building:
    """Collects the nodes and tensors to add to one model. Each new tensor has a key, and is created once per key.

    Args:
        model: the model that is being changed.

    Attributes:
        apart: the nodes of some layers. The graph adds a vector to the output of each such layer, but this vector is
            not the layer's bias; see biases.py.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = model.graph.opset_imports.get("", OPSET)
        self.taken = {value.name for graph in model.graphs() for value in _values(graph)}
        self.taken |= {node.name for graph in model.graphs() for node in graph}
        self.tensors: dict[Hashable, ir.Value] = {}
        self.kept: list[object] = []
        self.inputs: list[ir.Value] = []
        self.moved: dict[ir.Value, ir.Value] = {}
        self.apart: set[ir.Node] = set()

    def now(self, value: ir.Value) -> ir.Value:
        """Return the current replacement of `value`, or `value` itself if it was not replaced."""
        # Follow the whole chain: several targets may replace the same output, one after the other.
        while value in self.moved:
            value = self.moved[value]
        return value

    def name(self, wanted: str) -> str:
        """Reserve a unique name, and return it: `wanted`, with a number appended if this name is taken."""
        name, count = wanted, 0
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name

    def tensor(self, key: Hashable, wanted: str, make: Callable[[], Array]) -> ir.Value:
        """Return the initializer for `key`. The first call with a key calls `make` to create it.

        `settle` adds the initializer to the graph if a node reads it.
        """
        if key not in self.tensors:
            array = np.asarray(make(), order="C")  # `ascontiguousarray` would turn a scalar into shape [1].
            name = self.name(wanted)
            tensor = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype), name=name)
            self.tensors[key] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.tensors[key]

    def literal(self, array: Array) -> ir.Value:
        """Return an initializer that holds the array; equal arrays share one initializer."""
        return self.tensor(
            ("literal", array.dtype.str, array.shape, array.tobytes()), "adapterkit.constant", lambda: array
        )

    def slot(self, key: Hashable, wanted: str, default: Array, shape: Sequence[int | str]) -> ir.Value:
        """Return an optional input: an initializer that holds the default value and is also listed as a graph input."""
        if key not in self.tensors:
            value = self.tensor(key, wanted, lambda: default)
            # Declare `shape`, not the default's shape: the default has size 0 or 1 at dynamic axes, and the graph must
            # not declare this size as fixed.
            value.shape = ir.Shape(shape)
            self.inputs.append(value)
        return self.tensors[key]

    def keep(self, thing: object) -> int:
        """Return the `id` of an object, and keep the object alive so that the id is not reused."""
        self.kept.append(thing)
        return id(thing)

    def settle(self) -> None:
        """Add the new initializers and inputs to the graph, except those that no node reads."""
        for value in self.tensors.values():
            if value.uses() and not value.is_initializer():
                self.model.graph.register_initializer(value)
        self.model.graph.inputs.extend(value for value in self.inputs if value.uses())
        self._rename_generated()
        self.model.ir_version = max(self.model.ir_version or 0, 4)  # Before IR 4, initializers must also be inputs.

    def _rename_generated(self) -> None:
        """Rename the shape and permutation tensors that onnxruntime added when it optimized and wrote this graph.

        When onnxruntime optimizes the graph again, it may add tensors with the same names; the graph then does not
        load. This happens if onnxruntime first removes nodes that read the old tensors, and later adds tensors for the
        new nodes.
        """
        for name, value in list(self.model.graph.initializers.items()):
            constant = value.const_value
            small = constant is not None and constant.dtype == ir.DataType.INT64 and constant.size <= 16
            if small and GENERATED.search(name) and not value.is_graph_input() and not value.is_graph_output():
                value.name = self.name(f"{name}.stored")


class Branch:
    """Collects the new nodes of one target, in the order in which they run, before they are inserted into the graph.

    Args:
        building: collects the changes to the model.
        name: the prefix of the new nodes' names.
    """

    def __init__(self, building: Building, name: str) -> None:
        self.building, self.name = building, name
        self.nodes: list[ir.Node] = []

    @property
    def opset(self) -> int:
        return self.building.opset

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Attribute] | None,
        dtype: npt.DTypeLike, shape: Sequence[int | None] | None, position: int = 0, domain: str = "",
    ) -> ir.Value:  # fmt: skip
        """Append a node, and return its output at index `position`, the only output that other nodes can read."""
        name = self.building.name(f"{self.name}/{op}")
        out = ir.Value(name=f"{name}_output", type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))
        # Omit a shape that has a size of FREE or more. Such a size stands for a dynamic size and must not be written to
        # the file.
        if shape is not None and all(size is not None and size < FREE for size in shape):
            out.shape = ir.Shape(shape)
        outputs = [*(ir.Value(name=f"{name}_unread_{at}") for at in range(position)), out]
        typed = {key: _typed(key, value) for key, value in (attributes or {}).items()}
        self.nodes.append(ir.node(op, inputs, typed, domain=domain, outputs=outputs, name=name))
        return out

    def back_to(self, count: int) -> None:
        """Keep the first `count` nodes, and remove the others."""
        _disconnect(self.nodes[count:])
        del self.nodes[count:]

    def waiting(self, results: Iterable[ir.Value]) -> list[ir.Node]:
        """Return the nodes that compute `results` and are not in a graph yet, in the order in which they run."""
        wanted, needed = set(results), []
        for node in reversed(self.nodes):
            if any(out in wanted for out in node.outputs):
                needed.append(node)
                wanted.update(value for value in node.inputs if value is not None)
        return [node for node in reversed(needed) if node.graph is None]

    def close(self) -> None:
        """Empty the branch. Disconnect nodes that are in no graph, so that they do not count as readers of values."""
        _disconnect([node for node in self.nodes if node.graph is None])
        self.nodes.clear()


KEEPS_TYPE = frozenset({
    "Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Concat", "Gather", "Mul", "Add", "Sub", "Div",
    "MatMul", "Gemm", "Conv", "Relu", "Gelu", "Tanh", "Sigmoid", "Erf", "Sqrt", "Softmax", "LayerNormalization",
    "Split", "Flatten", "Expand", "ReduceMean", "Clip",
})  # fmt: skip
"""Operators whose output has the element type of their first input."""


def element_type(value: ir.Value | None) -> Dtype:
    """Return a value's numpy dtype, as declared in the graph or inferred from earlier nodes; float32 if unknown."""
    while value is not None:
        dtype = value.const_value.dtype if value.dtype is None and value.const_value is not None else value.dtype
        if dtype is not None and dtype not in _UNKNOWN:
            return dtype.numpy()
        node = value.producer()
        if node is not None and node.op_type == "Cast":
            return _cast_to(node)
        dequantized = node is not None and node.op_type == "DequantizeLinear"
        value = (
            node.inputs[int(dequantized)] if node is not None and (dequantized or node.op_type in KEEPS_TYPE) else None
        )
    return np.dtype(np.float32)


def _cast_to(node: ir.Node) -> Dtype:
    to = node.attributes["to"].as_int()
    try:
        return ir.DataType(to).numpy()
    except (TypeError, ValueError):
        raise Malformed(f"a Cast has the unknown type {to}", where=node.name, cure="Export the model again") from None


_UNKNOWN = (ir.DataType.UNDEFINED, ir.DataType.STRING)


def kind_of(value: ir.Value) -> ir.DataType:
    """Return the result of `element_type` as an ONNX data type."""
    return ir.DataType.from_numpy(element_type(value))


def _typed(name: str, value: Attribute) -> Attribute:
    """Convert a list of integers to an attribute of onnx-ir, and return any other value unchanged.

    Given a plain list, onnx-ir would test the list against each of its protocols to find the attribute's type. This
    took a quarter of the time of an injection.
    """
    if isinstance(value, list | tuple):
        whole = [one for one in value if type(one) is int]
        if whole and len(whole) == len(value):
            return ir.AttrInt64s(name, whole)
    return value


def _disconnect(nodes: Sequence[ir.Node]) -> None:
    for node in reversed(nodes):
        for position in range(len(node.inputs)):
            node.replace_input_with(position, None)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


# Insert a branch's nodes into a graph, after the node whose output they replace or before the readers of this output.


def behind(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Insert the nodes that compute `new` after the node that computes `old`, and replace `old` with `new`."""
    if new is old:
        return
    last = old.producer()
    assert last is not None
    _graph(last).insert_after(last, branch.waiting([new]))
    takes_over(old, new, branch)
    branch.building.moved[old] = new


def before(readers: Iterable[ir.Node], old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Insert the nodes that compute `new` before the first of `readers`, and make `readers` read `new`, not `old`."""
    among = set(readers)
    uses = [use for use in old.uses() if use.node in among]
    graph, reading = _graph(uses[0].node), {use.node for use in uses}
    graph.insert_before(next(node for node in graph if node in reading), branch.waiting([new]))
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def takes_over(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Replace all uses of `old` with `new`, except in the branch's nodes. If `old` is a graph output, keep its name."""
    branch_nodes = set(branch.nodes)
    for use in old.uses():
        if use.node not in branch_nodes:
            use.node.replace_input_with(use.idx, new)
    # Give the new value the name of the old one, because callers select a graph's outputs by name.
    if old.is_graph_output():
        made_by = new.producer()
        assert made_by is not None
        _rename_output(_graph(made_by), old, new, branch)
    new.shape = new.shape or old.shape


def readers_of(value: ir.Value, branch: Branch) -> list[ir.Node]:
    """Return the nodes that read a value, except the branch's own nodes."""
    branch_nodes = set(branch.nodes)
    return [use.node for use in value.uses() if use.node not in branch_nodes]


def _rename_output(graph: ir.Graph, old: ir.Value, new: ir.Value, branch: Branch) -> None:
    for position, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[position] = new
    name, old.name = old.name, branch.building.name(f"{branch.name}/base")
    new.name, new.shape, new.type = name, old.shape, old.type


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


# Copy nodes, to run the same computation on other inputs.


Copies = dict[ir.Value, ir.Value]
"""A map from original values to the values that the copied nodes read instead."""


def copied(nodes: Sequence[ir.Node], copies: Copies, name: Callable[[str], str]) -> list[ir.Node]:
    """Copy nodes, and make the copies read the replacements in `copies`.

    Args:
        nodes: the nodes, in the order in which they run.
        copies: a map from values that the nodes read to their replacements. The copies' outputs are added to this map.
        name: returns a unique name for a copy, given the original's name.

    Raises:
        Unsupported: a node has a subgraph.
    """
    return [_copied(node, copies, name) for node in nodes]


def _copied(node: ir.Node, copies: Copies, name: Callable[[str], str]) -> ir.Node:
    # Refuse a node with a subgraph. The subgraph may read values of the outer graph, which this code does not replace.
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    ):
        cure = "Inject the adapter into the torch model, and export that model"
        raise Unsupported(f"a {node.op_type} has a subgraph and cannot be copied", where=node.name, cure=cure)
    copy = ir.Node(
        node.domain, node.op_type, [None if one is None else copies.get(one, one) for one in node.inputs],
        list(node.attributes.values()), num_outputs=len(node.outputs), overload=node.overload,
        name=name(node.name or node.op_type),
    )  # fmt: skip
    for output, other in zip(node.outputs, copy.outputs, strict=True):
        other.name = name(output.name or "output")
        # Drop the names of dynamic sizes: runtimes share memory between values whose sizes have equal names, and the
        # copy's sizes may differ.
        fixed = None if output.shape is None else [size if isinstance(size, int) else None for size in output.shape]
        other.shape, other.type = None if fixed is None else ir.Shape(fixed), output.type
        copies[output] = other
    return copy


def between(start: ir.Value | None, end: ir.Value, among: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes that compute `end` from `start`, in the order in which they run.

    Args:
        start: the value on which all returned nodes depend; None to return all nodes that contribute to `end`.
        end: the value to compute.
        among: the nodes to consider, in the order in which they run.
    """
    after = set[ir.Value]() if start is None else {start}
    reached = []
    for node in among:
        if start is None or any(one in after for one in node.inputs if one is not None):
            after.update(node.outputs)
            reached.append(node)
    wanted, needed = {end}, []
    for node in reversed(reached):
        if any(out in wanted for out in node.outputs):
            wanted.update(one for one in node.inputs if one is not None)
            needed.append(node)
    return needed[::-1]
