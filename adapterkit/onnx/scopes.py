"""Names of modules in a graph: the metadata of torch's newer exporter, and comparison of names."""

from __future__ import annotations

import ast

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node that lists the modules that it is in."""

CLASSES = "pkg.torch.onnx.class_hierarchy"
"""Metadata key of a node that lists the classes of these modules."""

_LIST = 1 << 16
"""Longest list in characters; an untrusted file may have any length."""


def listed(text: str | None) -> list[str]:
    """Parse a list of words from a graph's metadata; return an empty list if it is invalid."""
    if not text or len(text) > _LIST:
        return []
    try:
        # torch writes the list as Python's repr, which is not JSON.
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [word for word in value if isinstance(word, str)] if isinstance(value, list | tuple) else []


def same_end(one: str, other: str) -> bool:
    """Whether two dotted paths are equal except for a prefix that a wrapper adds."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
