"""Define the top-level fields of a config, and the releases that wrote it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

LIBRARY = "adapters."
"""The beginning of `version` in configs of `adapters`; its predecessor adapter-transformers wrote other versions."""

RELEASE = "adapters.1.3.0"
"""The release that new configs name."""

UNSCALED_UNTIL = ((1, 1, 0), True)
"""Before this release, the library trained LoRA without a scaling."""

Release = tuple[tuple[int, ...], bool]
"""(numbers, whether the release is final); `1.1.0.dev0` sorts before `1.1.0`."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The top-level fields of a config.

    Attributes:
        name: the adapter's name, which the keys contain.
        model_type: the base's model type in transformers.
        model_name: the base's name.
        version: the library and the release that wrote the file.
        interface: the plugin interface in the folder, or None.
    """

    name: str
    model_type: str | None = None
    model_name: str | None = None
    version: str | None = None
    interface: dict[str, Any] | None = None

    @property
    def unscaled(self) -> bool:
        """Whether the library trained the adapter without alpha / r, as `adapters` did before 1.1."""
        release = _release(self.version)
        return release is not None and release < UNSCALED_UNTIL


def _release(version: str | None) -> Release | None:
    """Parse a release of `adapters`; return None for other texts, such as releases of adapter-transformers."""
    found = re.match(r"adapters\.(\d{1,6}(?:\.\d{1,6}){0,3})(.{0,40})$", version or "")
    if found is None:
        return None
    numbers = tuple(int(number) for number in found[1].split("."))
    return (*numbers, 0, 0, 0)[:3], not re.search(r"dev|a|b|rc", found[2])
