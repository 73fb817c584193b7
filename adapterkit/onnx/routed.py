"""Refuse targets in experts that one node routes, multiplies and activates: `MoE` and `QMoE` of onnxruntime.

Such a node holds the weights of all experts and selects them for each token. Its output is no sum of products with
these weights, so nodes beside it cannot add an adapter's change.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QMoE
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import Unsupported
from .operands import nodes_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..core.adapter import Adapter

OPERATORS = ("MoE", "QMoE")

_LAYER = re.compile(r"(?:^|[./])(?:layers|h|blocks)[./](\d+)[./]")


def refuse_routed(model: ir.Model, adapter: Adapter) -> None:
    """Refuse an adapter's targets in experts if a node of the same layer holds all experts.

    Raises:
        Unsupported: there is such a target; the error names the node and its operator.
    """
    targets = [target for target in adapter.updates if "experts" in target.path.split(".")]
    if not targets:
        return
    nodes = [node for node in nodes_of(model) if node.domain == "com.microsoft" and node.op_type in OPERATORS]
    for target in targets:
        layer = _layer(f"{target.path}.")
        for node in nodes:
            held = [value.name or "" for value in node.inputs if value is not None and "experts" in (value.name or "")]
            if layer is not None and layer in {_layer(name) for name in (node.name or "", *held)}:
                why = (
                    f"its experts are inside the node {node.name or node.outputs[0].name} ({node.op_type}), which "
                    "selects, multiplies and activates them at once, so nodes beside it cannot add the change"
                )
                cure = (
                    "Merge the adapter into the base (adapterkit merge BASE A -o OUT), and build the graph from that; "
                    "or omit such targets: --allow-partial (allow_partial=True)"
                )
                raise Unsupported(why, where=str(target), cure=cure)


def _layer(name: str) -> str | None:
    """Return the number of the layer in a name of a module, tensor or node; None if it has none."""
    found = _LAYER.search(name)
    return None if found is None else found.group(1)
