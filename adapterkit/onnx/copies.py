"""Copies of nodes, which compute the same on other values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..errors import Unsupported

Copies = dict[ir.Value, ir.Value]
"""What stands for a value in the copies."""


def copied(nodes: Sequence[ir.Node], copies: Copies, name: Callable[[str], str]) -> list[ir.Node]:
    """The nodes once more.

    Args:
        nodes: in the order in which they run.
        copies: what they read instead; gets what they give.
        name: makes a name that nothing else has.

    Raises:
        Unsupported: one of them has graphs inside.
    """
    return [_copied(node, copies, name) for node in nodes]


def _copied(node: ir.Node, copies: Copies, name: Callable[[str], str]) -> ir.Node:
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
        # Names of open sizes may mean others where the copy stands: runtimes share memory by them.
        fixed = None if own.shape is None else [size if isinstance(size, int) else None for size in own.shape]
        other.shape, other.type = None if fixed is None else ir.Shape(fixed), own.type
        copies[own] = other
    return copy


def between(start: ir.Value | None, end: ir.Value, among: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes that a value goes through to become another, in order; all that make it where there is no start.

    Args:
        start: the value they begin at.
        end: the value that they give.
        among: the nodes that count, in order.
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
