"""Convert a model to the form in which layers can be found: a recent opset, and no calls of local functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import AdapterkitError, Unsupported, first_line
from .building import INLINE, OPSET
from .operands import is_constant
from .validating import check_model

INLINED = "adapterkit.inlined"
"""Key in a model's `meta` for the names of the local functions that were inlined; `meta` is not written to files."""

LAYERS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "Einsum"})
"""Operators whose nodes can be layers."""


def modern(model: ir.Model, path: Path | None) -> ir.Model:
    """Return the model in a recent opset and without local functions; convert it with ONNX's own tools if needed.

    Raises:
        Unsupported: the model's operator set cannot be converted.
    """
    names = ", ".join(dict.fromkeys(function.name for function in model.functions.values()))
    inlined = _without_functions(model)
    recent = _recent(inlined, path)
    if names and not recent.functions:
        recent.meta[INLINED] = names
    return recent


def inlined_note(model: ir.Model) -> str | None:
    """Return a note that names the local functions that `modern` inlined; None if it inlined none."""
    names = model.meta.get(INLINED)
    return None if names is None else f"calls of local functions were replaced by the functions' nodes ({names})"


def _without_functions(model: ir.Model) -> ir.Model:
    """Replace each call of a local function by the function's nodes, so that an adapter can change one call alone."""
    if not model.functions:
        return model
    from onnx_ir.passes.common import InlinePass

    copy = model.clone()
    for function in copy.functions.values():
        if _is_the_same_in(function, copy.opset_imports):
            function.opset_imports.update(copy.opset_imports)
    _name_layers(copy)
    try:
        return InlinePass()(copy).model
    except Exception:  # The pass raises several types of errors. `resolve` refuses layers in functions that remain.
        return model


def _is_the_same_in(function: ir.Function, opsets: Mapping[str, int]) -> bool:
    """Whether a function's operators have the same definitions in the model's opsets as in the function's own opsets.

    Two versions of an operator count as the same if they have the same inputs, outputs and attributes, because most new
    versions only add dtypes.
    """
    from onnx.defs import SchemaError, get_schema

    def form(op: str, version: int, domain: str) -> object:
        schema = get_schema(op, version, domain)
        ports = [(one.name, one.option) for one in (*schema.inputs, *schema.outputs)]
        words = {
            name: (one.type, one.required, one.default_value.SerializeToString())
            for name, one in schema.attributes.items()
        }
        return ports, words

    used = {(node.op_type, node.domain) for node in function.all_nodes()}
    given = function.opset_imports
    changed = {domain for domain in given if domain in opsets and given[domain] != opsets[domain]}
    try:
        return all(
            form(op, given[domain], domain) == form(op, opsets[domain], domain)
            for op, domain in used
            if domain in changed
        )
    except SchemaError:  # The installed onnx package lacks the operator, or lacks this version of it.
        return False


def _name_layers(model: ir.Model) -> None:
    """Copy the module path from the name of a local function's call to the name of the function's layer.

    Inlining removes the call and its name, but keeps the layer's name. Functions that do not have exactly one layer are
    left as they are. A layer whose name already contains a path keeps its name.

    A call that stands for a module has the module's path in its name, as in `/block/fc/Linear`. Each such call gets its
    own copy of the function. In this copy, the layer's node gets the name that exporters give to a node of the module:
    `/block/fc/MatMul`.
    """
    for number, call in enumerate(list(model.graph.all_nodes())):
        function = model.functions.get(call.op_identifier())
        path = (call.name or "").rpartition("/")[0]
        if function is None or not path:
            continue
        copy = function.clone()
        layers = [node for node in copy if node.op_type in LAYERS and any(map(is_constant, node.inputs))]
        if len(layers) != 1 or "/" in (layers[0].name or ""):
            continue
        layers[0].name = f"{path}/{layers[0].op_type}"
        copy.overload = call.overload = f"{function.overload}{number}"
        model.functions[copy.identifier()] = copy
    nodes = [*model.graph.all_nodes(), *(node for one in model.functions.values() for node in one.all_nodes())]
    called = {node.op_identifier() for node in nodes}
    for name in [name for name in model.functions if name not in called]:
        del model.functions[name]


def _recent(model: ir.Model, path: Path | None) -> ir.Model:
    """Return the model, converted to the opset `OPSET` if its opset is older."""
    version = model.graph.opset_imports.get("", OPSET)
    if version >= OPSET:
        return model
    from onnx import version_converter

    outside = _inputs_for_outside(model)
    try:
        converted = version_converter.convert_version(ir.to_proto(model), OPSET)
        check_model(converted, path)
        return _with_outside(ir.from_proto(converted), outside)
    except AdapterkitError:
        raise
    except Exception as error:  # The converter raises RuntimeError and others.
        first = first_line(error)
        why = f"the model's operator set {version} cannot be converted to {OPSET} ({first})"
        raise Unsupported(why, path=path, cure="Export the model with a newer operator set") from None


def _inputs_for_outside(model: ir.Model) -> dict[str, tuple[ir.TensorProtocol, bool]]:
    """Turn tensors with external data into inputs, because ONNX's opset converter would drop references to data files.

    Small tensors and tensors of subgraphs are loaded instead. The converter needs the values of small tensors, for
    example the sizes of a Reshape.

    Returns:
        a map with an entry for each tensor that became an input. The key is the tensor's name. The value is a pair: the
        tensor, and True if the graph already had an input with this name.
    """
    outside: dict[str, tuple[ir.TensorProtocol, bool]] = {}
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.nbytes <= INLINE or graph is not model.graph:
                value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
                continue
            outside[name] = tensor, value.is_graph_input()
            graph.initializers.pop(name)
            value.const_value, value.shape, value.type = None, tensor.shape, ir.TensorType(tensor.dtype)
            if not value.is_graph_input():
                graph.inputs.append(value)
    return outside


def _with_outside(model: ir.Model, outside: Mapping[str, tuple[ir.TensorProtocol, bool]]) -> ir.Model:
    """Undo `_inputs_for_outside` after the conversion: turn the inputs back into tensors with external data."""
    named = {value.name: value for value in model.graph.inputs}
    for name, (tensor, was_input) in outside.items():
        value = named[name]
        if not was_input:
            model.graph.inputs.remove(value)
        value.const_value = tensor
        model.graph.register_initializer(value)
    return model
