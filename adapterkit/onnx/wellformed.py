"""Checks of a model's own parts before anything reads them: onnx's parser takes every message that protobuf takes.

onnx.checker says the same and more, but serializes each part again, which doubles the memory of large initializers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import Malformed

_AGAIN = "Export the model again"
_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_DEEPEST = 100
"""Graphs inside graphs: real ones are bodies of loops and branches, a few deep."""


def check_parts(proto: onnx.ModelProto, path: Path) -> None:
    """Check that tensors have a type and as many numbers as their shapes say, and nodes and attributes what they are.

    Raises:
        Malformed: the first fault, with the name of the tensor or the node.
    """
    try:
        _check_graph(proto.graph, 0)
        for function in proto.functions:
            for node in function.node:
                _check_node(node, 0)
    except Malformed as error:
        raise error.at(path=path) from None


def _check_graph(graph: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise Malformed(f"graphs nested more than {_DEEPEST} deep", where=graph.name, cure=_AGAIN)
    for tensor in _tensors(graph):
        _check_tensor(tensor, tensor.name or "a tensor without a name")
    for node in graph.node:
        _check_node(node, depth)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _check_node(node: Any, depth: int) -> None:
    where = node.name or ", ".join(node.output) or "a node without a name"
    if not node.op_type:
        raise Malformed("a node without an operator", where=where, cure=_AGAIN)
    seen = set()
    for attribute in node.attribute:
        if not attribute.name or attribute.name in seen:
            why = f"the attribute {attribute.name!r} twice" if attribute.name else "an attribute without a name"
            raise Malformed(why, where=where, cure=_AGAIN)
        seen.add(attribute.name)
        if attribute.type == onnx.AttributeProto.UNDEFINED:
            raise Malformed(f"the attribute {attribute.name!r} has no type", where=where, cure=_AGAIN)
        if attribute.type == onnx.AttributeProto.TENSOR:
            _check_tensor(attribute.t, f"{where}: {attribute.name}")
        for tensor in attribute.tensors:
            _check_tensor(tensor, f"{where}: {attribute.name}")
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            _check_graph(graph, depth + 1)


def _check_tensor(tensor: Any, where: str) -> None:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype is ir.DataType.UNDEFINED:
        raise Malformed(f"no element type of ONNX's is {tensor.data_type}", where=where, cure=_AGAIN)
    if any(size < 0 for size in tensor.dims):
        raise Malformed(f"the shape {list(tensor.dims)[:9]}", where=where, cure=_AGAIN)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    count = math.prod(tensor.dims)
    if dtype is ir.DataType.STRING:
        held, needed = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        held, needed = len(tensor.raw_data), -(-count * dtype.bitwidth // 8)
    else:
        # A list of numbers has one entry a number, two a complex one, and one a byte of packed ones.
        held = max(len(getattr(tensor, field)) for field in _FIELDS)
        needed = (
            -(-count * dtype.bitwidth // 8) if dtype.bitwidth < 8 else count * (2 if "COMPLEX" in dtype.name else 1)
        )
    if held < needed or (held > needed and tensor.HasField("raw_data")):
        why = f"holds {held} where {dtype.name} {list(tensor.dims)[:9]} takes {needed}"
        raise Malformed(why, where=where, cure=_AGAIN)
