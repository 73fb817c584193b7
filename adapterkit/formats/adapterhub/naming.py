"""What a writer knows of the names in keys beside the targets themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

INNER = ("blocks", "decoder", "embeddings", "encoder", "h", "layer", "layers", "transformer.layer")
"""How paths begin in a bare model."""


@dataclass(frozen=True, slots=True)
class Naming:
    """How one file names what it holds.

    Attributes:
        name: the adapter's.
        model_type: the family of the base, if known.
        root: the path of the base model inside the model that was saved, empty for a bare one.
    """

    name: str
    model_type: str | None = None
    root: str = ""

    def key(self, path: str, kind: str, slot: str) -> str:
        """The key of a slot at a module."""
        return ".".join(part for part in (path, kind, self.name, slot) if part)

    def at_root(self, name: str = "") -> str:
        """The path of something that the whole model shares."""
        return ".".join(part for part in (self.root, name) if part)


def root_of(paths: Iterable[str]) -> str:
    """The path of the base model, by how the targets' paths begin."""
    first = {path.partition(".")[0] for path in paths if path}
    return first.pop() if len(first) == 1 and not first & {*INNER} else ""
