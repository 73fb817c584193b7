"""Shared code for families that adapt whole weights: sizes of the base's weights, GPT-2's Conv1D, patterns of sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....errors import ShapeMismatch, UsageError
from ....naming.layouts import stored_in_out
from ..file import Key, base_shape
from ..patterns import matches
from ..spelling import is_embedding

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import File


def layout(file: File, path: str) -> str:
    """Return the layout in which the base stores a weight, from the base's family of models or else from the config."""
    known = stored_in_out(path, None if file.base is None else file.base.config)
    turned = file.settings.fan_in_fan_out if known is None else known
    return "in out *k" if turned else "out *in"


def weight_shape(file: File, key: Key, why: str) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of the weight that a key's update changes.

    Raises:
        UsageError: the numbers depend on the base, and no base is given.
        ShapeMismatch: the base has no linear layer at this path.
    """
    if key.path in file.known:
        dims: Any = file.known[key.path].dims()
        return dims["out"], dims["in"]
    if file.base is None:
        raise UsageError(
            f"{why}, which the file does not state", where=key.path, cure="Give the base with --base (base=)"
        )
    shape = file.base_shape(f"{key.path}.weight")
    if shape is None or len(shape) != 2:
        found = "nothing" if shape is None else str(list(shape))
        raise ShapeMismatch(f"the base has {found} instead of a linear layer's weight", where=key.path, cure=_BASE)
    return (shape[1], shape[0]) if layout(file, key.path) == "in out *k" else (shape[0], shape[1])


def weight_in(base: Checkpoint | None, path: str, why: str) -> tuple[int, ...]:
    """Return the shape of the weight at a path, as the base stores it.

    Raises:
        UsageError: no base is given, or the base does not have this weight.
    """
    shape = None if base is None else base_shape(base, f"{path}.weight")
    if shape is None:
        raise UsageError(
            f"{why}, which the adapter does not state", where=path, cure="Give the base with --base (base=)"
        )
    return shape


def not_linear(target: Target, method: str) -> str:
    """Return the reason if a target is neither a linear layer nor a Conv1D; empty if it is one of the two."""
    if target.layout == "in out *k":
        return not_embedded(target, method)
    return "" if target.layout == "out *in" else f"PEFT has no {method} on a weight stored as {target.layout}"


def not_embedded(target: Target, method: str) -> str:
    """Return the reason if a target is an embedding, for methods that PEFT does not have for embeddings; else empty."""
    return f"PEFT has no {method} on an embedding" if is_embedding(target) else ""


def unlike(scalings: Mapping[str, float]) -> list[str]:
    """Return all paths if the scalings differ, because a config has only one scaling; otherwise an empty list."""
    return [] if len(set(scalings.values())) < 2 else list(scalings)


def size_at(size: int, pattern: Mapping[str, int] | None, path: str) -> int:
    """Return the size of a module from a pattern. A pattern fits the end of a path after a dot, or equals the path."""
    pattern = pattern or {}
    fitting = (name for name in pattern if matches(rf".*\.{name}$", path))
    return pattern.get(next(fitting, path), size)


def size_fields(sizes: Mapping[str, int], field: str) -> dict[str, JsonValue]:
    """Return fields for sizes: the most common size, and a pattern with the full path of every other module."""
    common = min(Counter(sizes.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    return {field: common, f"{field}_pattern": {path: size for path, size in sizes.items() if size != common}}


def side(tensor: Lazy, axis: int, axes: int) -> int:
    """Return the size of one axis of a tensor; -1 if the tensor does not have exactly `axes` axes."""
    return tensor.shape[axis] if len(tensor.shape) == axes else -1


def check_size(key: Key, found: int, said: int, field: str) -> None:
    """Check a size in the file against a field in the config.

    Raises:
        ShapeMismatch: the sizes differ.
    """
    if found != said:
        why = f"the size is {found}, but the config's {field} states {said}"
        raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")


_BASE = "Is this the base that the adapter was trained on?"
