"""Names of modules in a graph: what torch's newer exporter notes of a node, and whether two names are one module's."""

from __future__ import annotations

import ast

SCOPES = "pkg.torch.onnx.name_scopes"
"""The key of a node's metadata under which the modules that it is in are listed."""

CLASSES = "pkg.torch.onnx.class_hierarchy"
"""The key under which the classes of these modules are listed."""

_LIST = 1 << 16
"""Letters of such a list at most: an untrusted file may have any number."""


def listed(text: str | None) -> list[str]:
    """A list of words out of a graph's metadata; nothing where it is none."""
    if not text or len(text) > _LIST:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [word for word in value if isinstance(word, str)] if isinstance(value, list | tuple) else []


def same_end(one: str, other: str) -> bool:
    """Whether two dotted paths are equal but for what a wrapper puts in front."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
