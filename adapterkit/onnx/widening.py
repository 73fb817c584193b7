"""Run bfloat16 graphs in float32 to check them, because onnxruntime's CPU provider lacks most bfloat16 kernels.

The twin of a graph is a copy with float32 in place of bfloat16 everywhere. The twin's weights equal the graph's
weights, because float32 represents every bfloat16 number exactly. The only difference is that the twin does not round
to bfloat16 after each node. So if two graphs compute the same function in bfloat16, their twins compute the same
function in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import first_line
from .providers import session_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

    from .building import Array
    from .providers import OrtSession
    from .trial_inputs import Feeds

FLOAT, BFLOAT16 = 1, 16
"""The two element types in ONNX's enum `TensorProto.DataType`."""

TYPED = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
"""Names of node attributes that contain an element type, as a value of the enum `TensorProto.DataType`."""


def widened(model: bytes | str) -> bytes | None:
    """Return the bytes of a model's float32 twin; None if the model has no bfloat16.

    Args:
        model: the bytes of a model, or its path.
    """
    import onnx

    proto = (
        onnx.ModelProto.FromString(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    )
    if not any(_is_narrow(proto)):
        return None
    if not isinstance(model, bytes):
        onnx.load_external_data_for_model(proto, str(Path(model).parent))
    for graph in _graphs(proto.graph):
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(value.type)
        _widen_nodes(graph.node)
    for function in proto.functions:
        _widen_nodes(function.node)
        for value in function.value_info:
            _widen_type(value.type)
    data: bytes = proto.SerializeToString()
    return data


def started(model: bytes | str, optimized: bool = True) -> OrtSession:
    """Start a session of a graph, or of its float32 twin. The arguments are those of `session_of`.

    The twin is used if onnxruntime cannot load the bfloat16 graph, or if an input, an overridable initializer or an
    output is bfloat16.
    """
    try:
        session = session_of(model, optimized)
    except Exception:  # onnxruntime's errors have no common base class.
        if (twin := widened(model)) is None:
            raise
        return session_of(twin, optimized)
    return session_of(widened(model) or model, optimized) if _has_narrow_ends(session) else session


def as_fed(feeds: Feeds) -> dict[str, Array]:
    """Convert bfloat16 inputs to float32, for the twin of a graph."""
    return {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array for name, array in feeds.items()
    }


def widened_note(model: ir.Model, path: Path) -> str | None:
    """Return a note for the report if a graph was checked as its float32 twin; None if the graph itself was checked."""
    values_used = (value for graph in model.graphs() for node in graph for value in (*node.inputs, *node.outputs))
    if not any(value is not None and value.dtype == ir.DataType.BFLOAT16 for value in values_used):
        return None
    why = "its inputs or outputs are bfloat16"
    try:
        session = session_of(str(path))
        if not _has_narrow_ends(session):
            return None
    except Exception as error:  # onnxruntime's errors have no common base class.
        why = first_line(error)
    return f"compared in float32, because onnxruntime or numpy does not support the graph's bfloat16 ({why})"


def _has_narrow_ends(session: OrtSession) -> bool:
    """Whether an input, an overridable initializer or an output of a graph is bfloat16.

    numpy lacks this dtype, so such values cannot be compared.
    """
    entries = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
    return any(entry.type == "tensor(bfloat16)" for entry in entries)


def _is_narrow(proto: ModelProto) -> Iterator[bool]:
    """For each initializer, value and node of a model, yield whether it uses bfloat16."""
    for graph in _graphs(proto.graph):
        yield from (tensor.data_type == BFLOAT16 for tensor in graph.initializer)
        values = (*graph.input, *graph.output, *graph.value_info)
        yield from (value.type.tensor_type.elem_type == BFLOAT16 for value in values)
        yield from (_is_narrow_node(node) for node in graph.node)
    for function in proto.functions:
        yield from (_is_narrow_node(node) for node in function.node)


def _is_narrow_node(node: NodeProto) -> bool:
    return any(
        (one.name in TYPED and one.i == BFLOAT16) or any(each.data_type == BFLOAT16 for each in (one.t, *one.tensors))
        for one in node.attribute
    )


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for each in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(each)


def _widen_nodes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in TYPED and attribute.i == BFLOAT16:
                attribute.i = FLOAT
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _widen_tensor(tensor)


def _widen_type(type_proto: TypeProto) -> None:
    if type_proto.HasField("sequence_type"):
        _widen_type(type_proto.sequence_type.elem_type)
    elif type_proto.HasField("optional_type"):
        _widen_type(type_proto.optional_type.elem_type)
    elif type_proto.HasField("tensor_type") and type_proto.tensor_type.elem_type == BFLOAT16:
        type_proto.tensor_type.elem_type = FLOAT


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type != BFLOAT16:
        return
    from onnx import numpy_helper

    array: Any = numpy_helper.to_array(tensor)
    wide = numpy_helper.from_array(array.astype(np.float32), tensor.name)
    tensor.CopyFrom(wide)
