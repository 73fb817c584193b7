"""Quantize an exported graph with onnxruntime's quantizers, and measure the rounding error of each weight.

Weights are rounded in blocks of 32 inputs (`MatMulNBits`). In 8-bit graphs, an attribute allows onnxruntime to round
each layer's input too, in blocks of 32. Without this attribute, onnxruntime would unpack whole weights for each token.

onnxruntime's dynamic quantization is not used, because it rounds a layer's whole input with one scale. With a single
scale, models with a few large activations would lose most of their precision.

Adapters that are attached as nodes or slots stay in floating point.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported, first_line
from ..io.stages import stage
from .building import Building
from .changes import Fresh, settle, settled_from, unturned
from .model_file import opened, save_fresh
from .modules import SCOPES, listed
from .operands import attribute, is_constant, nodes_of
from .packed import PACKED, as_float, drop, is_packed
from .resolving import spots_of

SCHEMES: dict[str, dict[str, Any]] = {"int8": {"bits": 8, "accuracy_level": 4}, "int4": {"bits": 4}}
"""A map from each scheme to the options of onnxruntime's quantizer: the bits per weight, and the accuracy level of the
kernels. Level 4 allows kernels to compute in 8-bit integers."""

BLOCK = 32
"""The block size: for each output of a layer, the weights of this many consecutive inputs share one scale."""

_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""Metadata that onnxruntime's quantizers expect; without it, they log a warning."""


def prepare(graph: ir.Model, names: Collection[str]) -> None:
    """Rewrite linear layers to the form that onnxruntime's quantizers support.

    This form is a `MatMul` with a stored `[in, out]` weight, followed by an `Add` if the layer has a bias.

    Args:
        graph: a traced export, in which each weight has its own Transpose.
        names: the names of the weights to quantize. They do not include the names of the adapters' tensors.
    """
    building, fresh = Building(graph), Fresh()
    for node in list(nodes_of(graph)):
        if node.op_type == "Gemm" and node.domain == "":
            _prepare_gemm(node, names, building, fresh)
        elif node.op_type == "MatMul" and is_constant(node.inputs[1]):
            assert node.inputs[1] is not None
            stored, before = unturned(node.inputs[1]), node.inputs[1].producer()
            if stored.turned and stored.value.name in names and stored.value.const_value is not None:
                node.replace_input_with(1, _turned(node, stored.value, building, fresh))
                drop(before)
    settle(fresh.values())
    graph.metadata_props.update(_PREPARED)


def _prepare_gemm(node: ir.Node, names: Collection[str], building: Building, fresh: Fresh) -> None:
    x, W, *rest = node.inputs
    plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta")) and not attribute(node, "transA", 0)
    if W is None or W.name not in names or W.const_value is None or not plain or node.graph is None:
        return
    weight = _turned(node, W, building, fresh) if attribute(node, "transB", 0) else W
    product = ir.node("MatMul", [x, weight], name=building.name(f"{node.name}/MatMul"))
    product.metadata_props.update(node.metadata_props)
    new = [product]
    if rest and rest[0] is not None:
        new.append(ir.node("Add", [product.outputs[0], rest[0]], name=building.name(f"{node.name}/Add")))
    out = new[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [node.outputs[0]], [out])


def _turned(node: ir.Node, W: ir.Value, building: Building, fresh: Fresh) -> ir.Value:
    """Return the transposed weight, `[in, out]`, with a new name, because other nodes may read the original tensor."""
    tensor = W.const_value
    assert tensor is not None
    if W not in fresh:
        modules = listed(node.metadata_props.get(SCOPES))[-2:-1]
        module = modules[0] if modules and modules[0] else (W.name or "").removesuffix(".weight")
        name = building.name(f"{module}.MatMul.weight")
        shape, kind = ir.Shape(tensor.shape.numpy()[::-1]), tensor.dtype

        def turned() -> ir.TensorProtocol:
            return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=kind, name=name)

        lazy = ir.LazyTensor(turned, kind, shape, cache=False, name=name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=lazy)
        settled_from(building, fresh, value, W, W)
    return fresh[W]


def packed(model: Path, scheme: str, out: Path) -> dict[str, dict[str, float]]:
    """Quantize the linear layers of a graph, write the graph to `out`, and return the rounding error of each weight.

    Args:
        model: the file of a graph that `prepare` has changed. A temporary file is written beside it.
        scheme: one of `SCHEMES`.
        out: the file to write.

    Raises:
        Unsupported: onnxruntime's quantizer fails, or finds no layer that it can quantize.
    """
    stage(f"quantizing to {scheme}")
    graph = _quantized(model, scheme, model.with_name("quantized.onnx"))
    notes = opened(model).model.metadata_props.items()
    graph.metadata_props.clear()
    graph.metadata_props.update({key: note for key, note in notes if key not in _PREPARED})
    damage = _damage(model, graph)
    save_fresh(graph, out)
    return damage


def _quantized(model: Path, scheme: str, out: Path) -> ir.Model:
    try:
        with _unheard():
            _in_bits(model, SCHEMES[scheme], out)
    except Exception as error:  # The quantizers raise any type of error.
        first = first_line(error)
        raise Unsupported(
            f"onnxruntime cannot quantize the graph ({first})", cure="Export the model without --quantize (quantize=)"
        ) from error
    graph = opened(out).model
    if not any(is_packed(spot) for spot in spots_of(graph)):
        why = "onnxruntime's quantizer found no layer that it can quantize"
        raise Unsupported(why, cure="Export the model without --quantize (quantize=)")
    return graph


def _in_bits(model: Path, scheme: Mapping[str, object], out: Path) -> None:
    import onnx

    quantizers: Any = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = quantizers.MatMulNBitsQuantizer(onnx.load(model), block_size=BLOCK, is_symmetric=True, **scheme)
    quantizer.process()
    # Store the weights in a separate file, because a single protobuf file is limited to 2 GB.
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)


@contextmanager
def _unheard() -> Iterator[None]:
    """Silence logging inside the block, and then remove the handler that the quantizers add to the root logger."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


def _damage(model: Path, packed: ir.Model) -> dict[str, dict[str, float]]:
    """For each quantized module, return `{"error": e}`: its weight's relative rounding error, in the Frobenius norm."""
    initializers = opened(model).model.graph.initializers
    errors: dict[str, dict[str, float]] = {}
    for spot in spots_of(packed):
        for source in spot.sources if is_packed(spot) else ():
            name = PACKED.sub("", source.name or "")
            if name in initializers and initializers[name].const_value is not None:
                W = initializers[name].const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
                R = spot.kind.stored_array(spot.node).astype(np.float32)
                R = R if spot.kind.turns(spot.node) else R.T
                size = max(float(np.linalg.norm(W)), 1e-30)
                module = name.removesuffix(".weight").removesuffix(".MatMul")
                errors[module] = {"error": float(np.linalg.norm(R - W)) / size}
    return errors


def with_exact_inputs(packed: Path, out: Path) -> None:
    """Write a copy of a quantized graph. The copy does not round layers' inputs, so a check tests only the weights."""
    model = opened(packed).model
    for node in nodes_of(model):
        if node.op_type == "MatMulNBits":
            node.attributes.pop("accuracy_level", None)
    save_fresh(model, out)


def as_floats(packed: Path, out: Path) -> None:
    """Write a copy of a quantized graph. The copy's weights are dequantized.

    A check compares this copy with the copy that `with_exact_inputs` writes.
    """
    model = opened(packed).model
    building, fresh = Building(model), Fresh()
    for spot in spots_of(model):
        if is_packed(spot):
            as_float(spot, building, fresh)
    building.settle()
    save_fresh(model, out)
