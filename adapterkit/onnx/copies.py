"""Copy nodes, so that they compute the same on other values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..errors import Unsupported

Copies = dict[ir.Value, ir.Value]
"""Original value -> its counterpart among the copies."""


def copied(nodes: Sequence[ir.Node], copies: Copies, name: Callable[[str], str]) -> list[ir.Node]:
    """Copy nodes.

    Args:
        nodes: in the order in which they run.
        copies: replacements for what they read; gets their new outputs.
        name: returns a unique name.

    Raises:
        Unsupported: a node has a subgraph.
    """
    return [_copied(node, copies, name) for node in nodes]


def _copied(node: ir.Node, copies: Copies, name: Callable[[str], str]) -> ir.Node:
    # A subgraph may read outer values, which would have to be replaced inside of it, too.
    if any(held.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for held in node.attributes.values()):
        cure = "Attach it to the torch model, and export that"
        raise Unsupported(f"a copy of a {node.op_type}", where=node.name, cure=cure)
    copy = ir.Node(
        node.domain, node.op_type, [None if one is None else copies.get(one, one) for one in node.inputs],
        list(node.attributes.values()), num_outputs=len(node.outputs), overload=node.overload,
        name=name(node.name or node.op_type),
    )  # fmt: skip
    for own, other in zip(node.outputs, copy.outputs, strict=True):
        other.name = name(own.name or "output")
        # Drop the names of open sizes. Runtimes share memory between values of equal names, and the copy's sizes may
        # differ.
        fixed = None if own.shape is None else [size if isinstance(size, int) else None for size in own.shape]
        other.shape, other.type = None if fixed is None else ir.Shape(fixed), own.type
        copies[own] = other
    return copy


def between(start: ir.Value | None, end: ir.Value, among: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes on the way from one value to another, in order.

    Args:
        start: the first value; None for all nodes that contribute to `end`.
        end: the last value.
        among: the nodes to consider, in order.
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
