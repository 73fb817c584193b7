"""Shared code of families of plain weights: sizes from the base, storage of GPT-2's Conv1D, patterns of sizes."""

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
    from ..file import File


def layout(file: File, path: str) -> str:
    """Return the layout in which the base stores the weight at a path: by its family, else as the config says."""
    known = stored_in_out(path, None if file.base is None else file.base.config)
    turned = file.settings.fan_in_fan_out if known is None else known
    return "in out *k" if turned else "out *in"


def weight_shape(file: File, key: Key, why: str) -> tuple[int, int]:
    """Return outputs and inputs of the weight that a key adapts.

    Raises:
        UsageError: there is no base to tell.
        ShapeMismatch: the base has no such linear layer.
    """
    if key.path in file.known:
        dims: Any = file.known[key.path].dims()
        return dims["out"], dims["in"]
    if file.base is None:
        raise UsageError(f"{why}, which the file does not hold", where=key.path, cure="Pass base=/--base")
    shape = file.base_shape(f"{key.path}.weight")
    if shape is None or len(shape) != 2:
        found = "nothing" if shape is None else str(list(shape))
        raise ShapeMismatch(f"the base has {found} where a linear layer's weight belongs", where=key.path, cure=_BASE)
    return (shape[1], shape[0]) if layout(file, key.path) == "in out *k" else (shape[0], shape[1])


def weight_in(base: Checkpoint | None, path: str, why: str) -> tuple[int, ...]:
    """Return the shape of the weight at a path, as the base stores it.

    Raises:
        UsageError: there is no base, or no such weight in it.
    """
    shape = None if base is None else base_shape(base, f"{path}.weight")
    if shape is None:
        raise UsageError(f"{why}, which the adapter does not hold", where=path, cure="Pass base=/--base")
    return shape


def not_linear(target: Target, method: str) -> str:
    """Say why a target is neither a linear layer nor a Conv1D; empty if it is one."""
    if target.layout == "in out *k":
        return not_embedded(target, method)
    return "" if target.layout == "out *in" else f"{method} on a weight stored {target.layout}"


def not_embedded(target: Target, method: str) -> str:
    """Say why a method that PEFT lacks for embeddings cannot be at a target; empty if it can."""
    return f"{method} on an embedding" if is_embedding(target) else ""


def unlike(scalings: Mapping[str, float]) -> list[str]:
    """Return all paths if a config with one scaling for all cannot state their scalings; else none."""
    return [] if len(set(scalings.values())) < 2 else list(scalings)


def size_at(size: int, pattern: Mapping[str, int] | None, path: str) -> int:
    """Return a size that patterns change: the first that matches after a dot, else the one that is the path itself."""
    pattern = pattern or {}
    fitting = (name for name in pattern if matches(rf".*\.{name}$", path))
    return pattern.get(next(fitting, path), size)


def size_fields(sizes: Mapping[str, int], field: str) -> dict[str, Any]:
    """Return the most common size, and a pattern with the whole path of each module that has another."""
    common = min(Counter(sizes.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    return {field: common, f"{field}_pattern": {path: size for path, size in sizes.items() if size != common}}


def side(tensor: Lazy, axis: int, axes: int) -> int:
    """Return the size of one axis of a tensor that should have so many axes; -1 if it does not."""
    return tensor.shape[axis] if len(tensor.shape) == axes else -1


def check_size(key: Key, found: int, said: int, field: str) -> None:
    """Check a tensor's size against the config's.

    Raises:
        ShapeMismatch: they differ.
    """
    if found != said:
        why = f"{found} where the config's {field} says {said}"
        raise ShapeMismatch(why, where=key.text, cure="The config is not of this file")


_BASE = "Is this the base that the adapter was trained on?"
