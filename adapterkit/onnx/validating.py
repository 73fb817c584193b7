"""Validate a model when it is opened, so that all other code can rely on the checks.

A tensor must store as much data as its shape needs. A node must have the inputs and attributes that its operator
requires, if onnx has a schema of the operator. Each graph must define each name only once, and its nodes must not form
cycles. onnx's checker is not used, because it refuses models that runtimes accept, and does not check how much data a
tensor stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import onnx_ir as ir

from ..errors import Malformed
from .building import OPSET

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    Schema = tuple[list[int], int, dict[str, tuple[int, bool]]]

MAX_AXES = 64
"""Largest number of axes of a tensor."""

MAX_NESTING = 64
"""Largest depth of graphs inside nodes; the main graph has depth 0."""

_FIELDS = {
    "float_data": ("FLOAT", "COMPLEX64"), "double_data": ("DOUBLE", "COMPLEX128"), "int64_data": ("INT64",),
    "uint64_data": ("UINT32", "UINT64"), "string_data": ("STRING",),
}  # fmt: skip
"""A map from each field of a `TensorProto` to the element types that the field stores. All other element types are
stored in `int32_data`."""

POSITIVE = {
    "Conv": ("group", "strides", "dilations"), "ConvTranspose": ("group", "strides", "dilations"),
    "MatMulNBits": ("N", "K", "bits", "block_size"), "Attention": ("num_heads",), "MultiHeadAttention": ("num_heads",),
}  # fmt: skip
"""A map from each operator to its attributes that must be at least 1. onnxruntime divides by some of these attributes,
and a division by 0 would end the process."""

_AGAIN = "Export the model again, or download the file again"


def check_model(proto: ModelProto, path: Path | None) -> None:
    """Check a model's tensors, nodes and names.

    Args:
        proto: the model.
        path: the model's file, for error messages.

    Raises:
        Malformed: the model has a fault; the error names the node, tensor or graph with the first fault.
    """
    opsets: dict[str, int] = {entry.domain: entry.version for entry in proto.opset_import}
    _check_graph(proto.graph, opsets, frozenset(), path, 0)
    for function in proto.functions:
        versions = opsets | {entry.domain: entry.version for entry in function.opset_import}
        for node in function.node:
            _check_node(node, versions, path)


def _check_graph(
    graph: GraphProto, opsets: dict[str, int], outer: frozenset[str], path: Path | None, depth: int
) -> None:
    if depth > MAX_NESTING:
        raise Malformed(f"graphs are nested more than {MAX_NESTING} deep", path=path, where=graph.name, cure=_AGAIN)
    for tensor in graph.initializer:
        _check_tensor(tensor, tensor.name, path)
        if not tensor.name:
            raise Malformed("an initializer has no name", path=path, where=graph.name, cure=_AGAIN)
    sparse = [one.values.name for one in graph.sparse_initializer]
    for tensor in (each for one in graph.sparse_initializer for each in (one.values, one.indices)):
        _check_tensor(tensor, tensor.name, path)
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | set(sparse)
    for names in (value.name for value in (*graph.input, *graph.output, *graph.value_info)):
        _check_text(names, "a value's name", path)
    inside = {name for node in graph.node for name in node.output if name}
    # A subgraph may read any value of this graph, even the output of a later node, because runtimes sort the nodes.
    known = frozenset(outer | given | inside)
    _check_order(graph, given, outer, path)
    for node in graph.node:
        _check_node(node, opsets, path)
        for each in _graphs(node):
            _check_graph(each, opsets, known, path, depth + 1)
    for value in graph.output:
        if value.name not in known:
            raise Malformed(f"nothing computes the output {value.name!r}", path=path, where=graph.name, cure=_AGAIN)


def _check_order(graph: GraphProto, given: set[str], outer: frozenset[str], path: Path | None) -> None:
    """Check that each name is defined once, and that there are no undefined inputs or cycles.

    The nodes may be in any order.
    """
    makers: dict[str, int] = {}
    for at, node in enumerate(graph.node):
        for name in node.output:
            _check_text(name, "an output's name", path)
            if name and (name in makers or name in given):
                raise Malformed(f"the value {name!r} is defined twice", path=path, where=_name(node), cure=_AGAIN)
            makers[name] = at
    makers.pop("", None)
    waits: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for at, node in enumerate(graph.node):
        before = set()
        for name in _read(node):
            if name in makers:
                before.add(makers[name])
            elif name not in given and name not in outer:
                raise Malformed(f"nothing computes its input {name!r}", path=path, where=_name(node), cure=_AGAIN)
        for one in before:
            readers.setdefault(one, []).append(at)
        waits.append(before)
    # Kahn's algorithm: a node that never becomes ready is on a cycle, or depends on a cycle.
    ready = [at for at, before in enumerate(waits) if not before]
    done = 0
    while ready:
        at, done = ready.pop(), done + 1
        for reader in readers.get(at, ()):
            waits[reader].discard(at)
            if not waits[reader]:
                ready.append(reader)
    if done < len(waits):
        _refuse_cycle(graph, makers, waits, path)


def _refuse_cycle(
    graph: GraphProto, makers: Mapping[str, int], waits: Sequence[set[int]], path: Path | None
) -> NoReturn:
    """Raise the error for a cycle.

    One known cause is onnxruntime's float16 converter. It renames the outputs of an If, but not the outputs of the If's
    branches. The branches then return values of the outer graph, and the outer graph computes these values from the
    outputs of the If.

    Args:
        graph: the graph.
        makers: a map from each value's name to the index of the node that computes the value.
        waits: for each node, the indices of the unsorted nodes that must run before this node. The set is empty if the
            node itself could be sorted.
        path: the model's file, for error messages.
    """
    for at, node in enumerate(graph.node):
        for name in _returned(node) if waits[at] else ():
            if name in makers and _waits_for(waits, makers[name], at):
                why = (
                    f"a graph inside this {node.op_type} does not compute its output {name!r} but returns the outer "
                    f"graph's value {name!r}, which the outer graph computes from the outputs of this {node.op_type}. "
                    "onnxruntime cannot load this file, either"
                )
                cure = "Convert the model again with a tool that supports subgraphs, or convert its parts separately"
                raise Malformed(why, path=path, where=_name(node), cure=cure)
    node = next(node for node, before in zip(graph.node, waits, strict=True) if before)
    why = "the graph has a cycle: this node, or a node before it, depends on itself"
    raise Malformed(why, path=path, where=_name(node), cure=_AGAIN)


def _returned(node: NodeProto) -> Iterator[str]:
    """Yield the names of outer values that the graphs inside a node return as their outputs."""
    for graph in _graphs(node):
        defined = _defined(graph)
        yield from (value.name for value in graph.output if value.name not in defined)


def _waits_for(waits: Sequence[set[int]], at: int, goal: int) -> bool:
    seen, left = {at}, [at]
    while left and goal not in seen:
        new = waits[left.pop()] - seen
        seen |= new
        left += new
    return goal in seen


def _graphs(node: NodeProto) -> list[GraphProto]:
    return [graph for each in node.attribute for graph in (*([each.g] if each.HasField("g") else []), *each.graphs)]


def _defined(graph: GraphProto) -> set[str]:
    """Return the names that a graph inside a node defines."""
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {one.values.name for one in graph.sparse_initializer}
    return defined | {name for each in graph.node for name in each.output}


def _read(node: NodeProto, depth: int = 0) -> Iterator[str]:
    """Yield the names that a node reads, including the outer values that its subgraphs read."""
    yield from (name for name in node.input if name)
    if depth > MAX_NESTING:
        return
    for graph in _graphs(node):
        defined = _defined(graph)
        yield from (name for each in graph.node for name in _read(each, depth + 1) if name not in defined)
        yield from (value.name for value in graph.output if value.name not in defined)


def _check_node(node: NodeProto, opsets: dict[str, int], path: Path | None) -> None:
    for text in (node.name, node.op_type, node.domain, *node.input):
        _check_text(text, "a node's name, operator, domain or input name", path)
    where = _name(node)
    for attribute in node.attribute:
        tensors = [attribute.t] if attribute.HasField("t") else []
        for tensor in (*tensors, *attribute.tensors):
            _check_tensor(tensor, f"{where}: {attribute.name}", path)
    if not node.op_type:
        raise Malformed("a node has no operator", path=path, where=where, cure=_AGAIN)
    if not node.output:
        raise Malformed("a node has no outputs", path=path, where=where, cure=_AGAIN)
    names = [attribute.name for attribute in node.attribute]
    for attribute in node.attribute:
        if not attribute.type or not attribute.name or names.count(attribute.name) > 1:
            why = f"the attribute {attribute.name!r} occurs twice, or it has no name or no type"
            raise Malformed(why, path=path, where=where, cure=_AGAIN)
    positive = POSITIVE.get(node.op_type, ())
    for attribute in node.attribute:
        if attribute.name in positive and (
            any(number < 1 for number in attribute.ints) or (attribute.HasField("i") and attribute.i < 1)
        ):
            why = f"the attribute {attribute.name} of a {node.op_type} must be at least 1"
            raise Malformed(why, path=path, where=where, cure=_AGAIN)
    domain = "" if node.domain == "ai.onnx" else node.domain
    schema = _schema(node.op_type, domain, opsets.get(domain, opsets.get(node.domain, 0)))
    if schema is None:
        return
    required, most, attributes = schema
    if len(node.input) > most or any(at >= len(node.input) or not node.input[at] for at in required):
        count = sum(bool(name) for name in node.input)
        why = (
            f"a {node.op_type} has {count} inputs, but requires inputs at the indices {required}, and accepts at most "
            f"{most} inputs"
        )
        raise Malformed(why, path=path, where=where, cure=_AGAIN)
    types = {attribute.name: attribute.type for attribute in node.attribute}
    for name, (kind, needed) in attributes.items():
        if (needed and name not in types) or (name in types and types[name] != kind):
            fault = "has the wrong type" if name in types else "is missing"
            why = f"the attribute {name} of a {node.op_type} {fault}"
            raise Malformed(why, path=path, where=where, cure=_AGAIN)


@lru_cache(maxsize=4096)
def _schema(op_type: str, domain: str, version: int) -> Schema | None:
    """Return the indices of an operator's required inputs, its maximum number of inputs, and its attributes.

    The attributes are a map from an attribute's name to the pair `(type, required)`. Return None if onnx has no schema
    of the operator, or if it is an operator of the default domain in an opset older than `OPSET`.
    """
    from onnx import defs

    # Skip opsets before OPSET: the model is first converted to OPSET, and then checked again.
    if domain == "" and version < OPSET:
        return None
    try:
        schema = defs.get_schema(op_type, version, domain)
    except (defs.SchemaError, TypeError, ValueError, OverflowError):
        return None
    single = defs.OpSchema.FormalParameterOption.Single
    required = [at for at, each in enumerate(schema.inputs) if each.option == single]
    attributes = {
        name: (int(each.type.value), each.required)  # type: ignore[attr-defined]
        for name, each in schema.attributes.items()
    }
    return required, schema.max_input, attributes


def _check_tensor(tensor: TensorProto, where: str, path: Path | None) -> None:
    _check_text(tensor.name, "a tensor's name", path)
    try:
        kind = ir.DataType(tensor.data_type)
    except ValueError:
        kind = ir.DataType.UNDEFINED
    if kind == ir.DataType.UNDEFINED:
        raise Malformed(f"a tensor has the unknown type {tensor.data_type}", path=path, where=where, cure=_AGAIN)
    dims: Sequence[int] = tensor.dims
    if len(dims) > MAX_AXES or any(size < 0 for size in dims):
        raise Malformed(f"a tensor has the invalid shape {list(dims)[:MAX_AXES]}", path=path, where=where, cure=_AGAIN)
    if tensor.data_location == tensor.EXTERNAL:
        return  # model_file.py checks external data.
    count = math.prod(dims)
    if tensor.HasField("raw_data"):
        count_stored, needed, unit = len(tensor.raw_data), -(-count * kind.bitwidth // 8), "bytes"
        if kind == ir.DataType.STRING:
            why = "a tensor of strings has raw_data; strings must be in string_data"
            raise Malformed(why, path=path, where=where, cure=_AGAIN)
    else:
        field = next((field for field, kinds in _FIELDS.items() if kind.name in kinds), "int32_data")
        per = 2 if kind.name.startswith("COMPLEX") else 1
        count_stored, unit = len(getattr(tensor, field)), "values"
        needed = count * per if kind == ir.DataType.STRING or kind.bitwidth >= 8 else -(-count * kind.bitwidth // 8)
    if count_stored != needed:
        why = f"a tensor has {count_stored} {unit}, but a {kind.name} tensor of shape {list(dims)} needs {needed}"
        raise Malformed(why, path=path, where=where, cure=_AGAIN)


def _check_text(text: object, what: str, path: Path | None) -> None:
    if not isinstance(text, str):  # protobuf returns bytes for text that is not UTF-8.
        raise Malformed(f"{what} is not UTF-8", path=path, where=repr(text)[:80], cure=_AGAIN)


def _name(node: NodeProto) -> str:
    return str(node.name or (node.output[0] if node.output else node.op_type))
