"""Numbers that differ from target to target: by glob, or along the depth of the model; and the methods they make.

A number may be given as itself, as a list (interpolated over the layers, first to last), or as a mapping of globs of
target paths to either, of which the first that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..core.adapter import Target

    Setting = Any

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class Depths:
    """How deep each target lies: 0 in the first layer, 1 in the last."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self.layers = {str(target): _layer(target) for target in targets}
        self.last = max((layer for layer in self.layers.values() if layer is not None), default=0)

    def known(self, target: Target) -> float | None:
        """The same, or None where the target is in no numbered layer."""
        return None if self.layers[str(target)] is None else self.of(target)

    def of(self, target: Target) -> float:
        """Raises UsageError: the target is in no numbered layer."""
        layer = self.layers[str(target)]
        if layer is None:
            why = "a list of numbers for a target that is in no numbered layer"
            raise UsageError(why, where=str(target), cure="Give a mapping of globs, with a number for such targets")
        return layer / self.last if self.last else 0.0


def at_target(setting: Setting, target: Target, depths: Depths, otherwise: Any) -> Any:
    """What a setting is at a target; `otherwise` where no glob fits."""
    if isinstance(setting, Mapping):
        for glob, value in setting.items():
            if fnmatchcase(str(target), glob) or fnmatchcase(target.path, glob):
                return at_target(value, target, depths, otherwise)
        return otherwise
    if isinstance(setting, (list, tuple)):
        return _between(setting, depths.of(target))
    return setting


def plain(setting: Setting, where: str) -> Setting:
    """A setting as plain data.

    Raises:
        UsageError: it is none.
    """
    if isinstance(setting, Mapping):
        if not setting or not all(isinstance(glob, str) for glob in setting):
            raise UsageError(
                "a mapping must be of globs to values", where=where, cure='Such as {"*.mlp.*": 0.5, "*": 1}'
            )
        return {glob: plain(value, where) for glob, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        numbers = [value for value in setting if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if not setting or len(numbers) < len(setting):
            raise UsageError("a list must be of numbers, for the first layer to the last", where=where, cure="Give one")
        return [float(value) for value in setting]
    if setting is not None and not isinstance(setting, (bool, int, float, str)):
        raise UsageError(f"{type(setting).__name__} is no value", where=where, cure="Give a number, list or mapping")
    return setting


def check_globs(setting: Setting, targets: Sequence[Target], where: str) -> None:
    """Refuses a glob that no target fits."""
    if not isinstance(setting, Mapping):
        return
    for glob in setting:
        if not any(fnmatchcase(str(target), glob) or fnmatchcase(target.path, glob) for target in targets):
            cure = f"Its targets are called like {targets[0].path}"
            raise UsageError(f"no target fits {glob!r}", where=where, cure=cure)


def _between(values: Sequence[float], depth: float) -> float:
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (place - low))


def _layer(target: Target) -> int | None:
    found = _LAYER.search(target.path)
    return None if found is None else int(found.group(1))
