"""Find the modules of the exported model in a graph: their names, nodes, inputs and outputs."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir

from ..errors import TargetNotFound, nearest
from ..naming.moves import same_end
from .building import element_type
from .operands import is_constant

SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata under which torch's new exporter stores the names of the modules around the node."""

CLASSES = "pkg.torch.onnx.class_hierarchy"
"""Key of a node's metadata under which torch's new exporter stores the classes of the modules around the node."""

_LIST = 1 << 16
"""Maximum length, in characters, of a text that `listed` parses. A text in an untrusted file may have any length."""


def listed(text: str | None) -> list[str]:
    """Parse a list of strings from a graph's metadata; return an empty list if the text is invalid."""
    if not text or len(text) > _LIST:
        return []
    try:
        # torch writes the list as Python's `repr`, which is not JSON.
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [word for word in value if isinstance(word, str)] if isinstance(value, list | tuple) else []


def dotted(path: str) -> str:
    """Convert a path in a node's name to the module's dotted name.

    torch's old exporter repeats a Sequential's name in the names of the modules inside it. Therefore,
    `/layer2/layer2.0/conv1` becomes `layer2.0.conv1`.
    """
    words = path.strip("/").split("/")
    following = [*words[1:], ""]
    return ".".join(one for one, other in zip(words, following, strict=True) if not other.startswith(f"{one}."))


# Modules of the exported model, found by the names that exporters write.
# Bottlenecks, ReFT and invertible adapters attach to modules that consist of several layers. torch's exporters record
# the modules around each node: the new exporter in the node's metadata, the old exporter in the node's name.


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """The part of a graph that computes one module.

    Attributes:
        path: the module's name in the graph.
        nodes: the module's nodes, in order.
        entering: the activations that the module reads but does not compute.
        leaving: the activations that the module computes, if they are outputs of the graph or nodes outside of the
            module read them.
    """

    path: str
    nodes: tuple[ir.Node, ...]
    entering: tuple[ir.Value, ...]
    leaving: tuple[ir.Value, ...]

    @property
    def read(self) -> ir.Value | None:
        """The activation that the module reads; None if the module reads no activation, or several."""
        return self.entering[0] if len(self.entering) == 1 else None

    def fed(self, channels: int | None, where: str) -> ir.Value:
        """Return the module's input that has `channels` channels; among several, the one that the residual Add reads.

        Raises:
            TargetNotFound: the module has no such input, or more than one.
        """
        candidates = [value for value in self.entering if len(_sizes(value)) == 3 and _sizes(value)[2] == channels]
        if len(candidates) > 1:
            # Select the input that the module's own Add reads: this Add is the residual connection, so one of its
            # operands is the module's input.
            adds = [node for node in self.nodes if node.op_type == "Add" and modules_of(node)[-1:] == (self.path,)]
            candidates = [value for value in candidates if any(value in node.inputs for node in adds)]
        if len(candidates) != 1:
            why = f"the module {self.path} reads {len(candidates)} values with {channels} channels; it must read one"
            raise TargetNotFound(why, where=where, cure="Export the model again with torch's exporter")
        return candidates[0]

    def given(self, channels: int | None, where: str) -> ir.Value:
        """Return the module's output that has `channels` channels, or any number of channels if `channels` is None.

        Raises:
            TargetNotFound: the module has no such output, or more than one.
        """
        candidates = [value for value in self.leaving if channels is None or _sizes(value)[-1:] == [channels]]
        # Skip the keys and values of a cache, which have an extra axis for the heads.
        rows = [value for value in candidates if len(_sizes(value)) == 3] or candidates
        if len(rows) != 1:
            why = f"the module {self.path} returns {len(rows)} values with {channels} channels; it must return one"
            raise TargetNotFound(why, where=where, cure="Export the model again with torch's exporter")
        return rows[0]


def module_at(model: ir.Model, path: str, where: str) -> Module:
    """Return the part of a graph that computes the base's module `path`.

    Raises:
        TargetNotFound: no module in the graph matches the path, or several do. The error suggests similar names.
    """
    modules_by_node = {node: modules_of(node) for node in model.graph}
    known = dict.fromkeys(name for names in modules_by_node.values() for name in names)
    fits = [path] if path in known else [name for name in known if same_end(name, path)]
    if len(fits) != 1:
        why = "the graph has no weight and no module of this name" if not fits else "several modules match this name"
        raise TargetNotFound(why, where=where, cure=nearest(path, known) or "Export the model with torch's exporter")
    nodes = tuple(node for node, names in modules_by_node.items() if fits[0] in names)
    inside = set(nodes)
    read = dict.fromkeys(one for node in nodes for one in node.inputs if one is not None)
    entering = tuple(one for one in read if one.producer() not in inside and _is_activation(one))
    given = [out for node in nodes for out in node.outputs if _is_activation(out)]
    leaving = tuple(out for out in given if out.is_graph_output() or any(use.node not in inside for use in out.uses()))
    return Module(fits[0], nodes, entering, leaving)


def modules_of(node: ir.Node) -> tuple[str, ...]:
    """Return the names of the modules around a node, outermost first."""
    return _scope_modules(node.metadata_props.get(SCOPES), node.name or "")


@lru_cache(maxsize=1 << 16)
def _scope_modules(scopes: str | None, name: str) -> tuple[str, ...]:
    """Parse the names of the modules around a node from its metadata or its name.

    The result is cached, because `module_at` calls this function for all nodes of the graph, once for each target.
    """
    listed_names = listed(scopes)
    if listed_names:
        return tuple(module for module in listed_names[:-1] if module)
    parts = name.split("/")
    # Only torch's old exporter writes the modules into a node's name, and its names start with a slash.
    if parts[0] or len(parts) < 3:
        return ()
    return tuple(dict.fromkeys(dotted("/".join(parts[1:end])) for end in range(2, len(parts))))


def _is_activation(value: ir.Value) -> bool:
    """Whether a value is a floating-point activation: not constant, and of unknown shape or with at least two axes."""
    broad = value.shape is None or len(value.shape) > 1
    return broad and element_type(value).kind in "fV" and not is_constant(value)


def _sizes(value: ir.Value) -> list[object]:
    return [] if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
