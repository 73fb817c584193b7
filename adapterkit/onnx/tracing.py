"""Trace a model with torch's exporter, and remove the graph's unneeded metadata.

The exporter's optimizer is off, because it renames folded weights and stores equal weights only once. Without the
optimizer, every weight keeps the name that it has in the module, and is stored separately. The graph then also keeps
the nodes that transpose weights, but onnxruntime folds these nodes when it loads the model.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, first_line
from ..io.stages import stage

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

SCOPES = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
"""Keys of a node's metadata that are kept. Their values list the names and the classes of the modules around the node.
The metadata under other keys describes the machine that exported the model."""


def traced(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None = None, *, inside: str = "",
    **options: object,
) -> ir.Model:  # fmt: skip
    """Trace a module, and return it as an ONNX model. The weights remain torch tensors until the model is written.

    Args:
        model: the module, in evaluation mode.
        args: an example of its positional arguments.
        kwargs: an example of its named arguments.
        inside: if the module is a wrapper, the name of its attribute that holds the model. This name is removed from
            the names of weights and modules in the graph.
        options: more arguments of `torch.onnx.export`: input and output names, dynamic shapes, the opset.

    Raises:
        Unsupported: torch cannot export the module.
    """
    stage("tracing the model")
    import torch

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        # Turn gradients off: with gradients, a `Scan` could not write to its state.
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, tuple(args), kwargs=dict(kwargs or {}), dynamo=True, optimize=False, verbose=False, **given
            )
    except Exception as error:  # The exporter raises any type of error.
        first = first_line(error.__cause__ or error)  # The exporter's own message is too general.
        cure = "Change the model's forward so that torch.export can trace it, or pass input_names= and dynamic_shapes="
        raise Unsupported(f"torch cannot export a {type(model).__name__} ({first})", cure=cure) from error
    assert program is not None
    graph: ir.Model = program.model
    _plain(graph, inside)
    return graph


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's messages about itself and about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before, logger.disabled = logger.level, True
    logger.setLevel(logging.ERROR)
    try:
        # Also silence Python warnings, because the exporter uses both its logger and warnings.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        logger.disabled = False


def _plain(graph: ir.Model, inside: str) -> None:
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for part in graph.graphs():
        for name, value in list(part.initializers.items()):
            if inside and name.startswith(f"{inside}."):
                value.name = name.removeprefix(f"{inside}.")
        for node in list(part):
            _without_added_bias(node)
            for key in list(node.metadata_props):
                if key not in SCOPES:
                    del node.metadata_props[key]
            _without(node.metadata_props, inside)


def _without_added_bias(node: ir.Node) -> None:
    """Remove the zeros that onnxscript adds to a three-dimensional convolution without a bias.

    These zeros have the shape `[out, 2]` instead of `[out]`, and onnxruntime refuses such a bias (onnxscript 0.7,
    `aten_conv3d`).
    """
    bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
    expand = None if bias is None else bias.producer()
    if expand is None or expand.op_type != "Expand" or expand.inputs[1] is None:
        return
    shape = expand.inputs[1].producer()
    if shape is not None and shape.op_type == "Concat" and len(shape.inputs) == 2:
        node.resize_inputs(2)


def _without(notes: dict[str, str], inside: str) -> None:
    """Remove the wrapper from the lists of module names and module classes in a node's metadata."""
    names = ast.literal_eval(notes.get(SCOPES[0], "[]"))
    if not inside or inside not in names:
        return
    at = names.index(inside)
    for key in SCOPES:
        if key in notes:
            words = ast.literal_eval(notes[key])
            del words[at]
            notes[key] = repr([word.removeprefix(f"{inside}.") for word in words])
