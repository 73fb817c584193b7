"""Tracing: torch's own exporter, and what of its graph is kept.

The exporter's optimiser is left off: it renames folded weights and stores equal ones once, while every weight keeps
its module's name, and its own copy, without it; onnxruntime folds the transposes when it loads the model.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported, first_line

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

SCOPES = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
"""What is kept of each node's notes: its modules' names and classes. The others tell of the exporting machine."""


def traced(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, inside: str = "",
    **options: Any,
) -> ir.Model:  # fmt: skip
    """A module as a graph; its numbers stay torch's own until they are written.

    Args:
        model: the module, in evaluation mode.
        args: an example of its positional arguments.
        kwargs: of its named ones.
        inside: the attribute of the module that holds what names are told of: it is left out of them.
        options: more for `torch.onnx.export`: names of inputs and outputs, dynamic shapes, the operator set.

    Raises:
        Unsupported: torch cannot export it.
    """
    import torch

    given = {name: value for name, value in options.items() if value is not None}
    try:
        with quiet():
            program = torch.onnx.export(
                model, tuple(args), kwargs=dict(kwargs or {}), dynamo=True, optimize=False, verbose=False, **given
            )
    except Exception as error:  # The exporter raises whatever its passes do.
        first = first_line(error.__cause__ or error)  # The exporter's own line names no fault.
        cure = "Make its forward traceable by torch.export, or name the inputs and their open sizes"
        raise Unsupported(f"torch cannot export a {type(model).__name__} ({first})", cure=cure) from error
    assert program is not None
    graph: ir.Model = program.model
    _plain(graph, inside)
    return graph


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself and on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    before, logger.disabled = logger.level, True
    logger.setLevel(logging.ERROR)
    try:
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
        for node in part:
            for key in list(node.metadata_props):
                if key not in SCOPES:
                    del node.metadata_props[key]
            _without(node.metadata_props, inside)


def _without(notes: dict[str, str], inside: str) -> None:
    """The lists of names and classes of modules without the one that all are inside of."""
    names = ast.literal_eval(notes.get(SCOPES[0], "[]"))
    if not inside or inside not in names:
        return
    at = names.index(inside)
    for key in SCOPES:
        if key in notes:
            words = ast.literal_eval(notes[key])
            del words[at]
            notes[key] = repr([word.removeprefix(f"{inside}.") for word in words])
