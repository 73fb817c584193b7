"""Insert a branch's nodes into a graph, after the value that they change or before the nodes that read it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from .building import Branch


def behind(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Insert the nodes of `new` after the node of `old`, and make all readers of `old` read `new`."""
    if new is old:
        return
    last = old.producer()
    assert last is not None
    _graph(last).insert_after(last, branch.waiting([new]))
    takes_over(old, new, branch)
    branch.building.moved[old] = new


def before(readers: Iterable[ir.Node], old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Insert the nodes of `new` before the first of some readers of `old`, and make these read `new`."""
    among = set(readers)
    uses = [use for use in old.uses() if use.node in among]
    graph, reading = _graph(uses[0].node), {use.node for use in uses}
    graph.insert_before(next(node for node in graph if node in reading), branch.waiting([new]))
    for use in uses:
        use.node.replace_input_with(use.idx, new)


def takes_over(old: ir.Value, new: ir.Value, branch: Branch) -> None:
    """Replace all uses of `old` with `new`, except in the branch itself; a graph output keeps its name."""
    own = set(branch.nodes)
    for use in old.uses():
        if use.node not in own:
            use.node.replace_input_with(use.idx, new)
    # Callers know a graph's outputs by name, so the new value takes over the old one's.
    if old.is_graph_output():
        made_by = new.producer()
        assert made_by is not None
        _rename_output(_graph(made_by), old, new, branch)
    new.shape = new.shape or old.shape


def readers_of(value: ir.Value, branch: Branch) -> list[ir.Node]:
    """Return the nodes that read a value, except for the branch's own."""
    own = set(branch.nodes)
    return [use.node for use in value.uses() if use.node not in own]


def _rename_output(graph: ir.Graph, old: ir.Value, new: ir.Value, branch: Branch) -> None:
    for position, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[position] = new
    name, old.name = old.name, branch.building.name(f"{branch.name}/base")
    new.name, new.shape, new.type = name, old.shape, old.type


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
