"""Define the top-level fields of a config, and interpret the release that wrote the config."""

from __future__ import annotations

import re
from typing import Any

import msgspec

LIBRARY = "adapters."
"""The beginning of `version` in configs of the `adapters` library; adapter-transformers wrote other versions."""

RELEASE = "adapters.1.3.0"
"""The `version` in new configs."""

UNSCALED_UNTIL = ((1, 1, 0), True)
"""Before this release, the adapters library trained LoRA without a scaling."""

Release = tuple[tuple[int, ...], bool]
"""The numbers of a release, and whether the release is final; so `1.1.0.dev0` sorts before `1.1.0`."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The top-level fields of a config.

    Attributes:
        name: the adapter's name, which the keys contain.
        model_type: the base's `model_type` in transformers.
        model_name: the base's name, such as a repository on the hub.
        version: the library that wrote the file, and its release, such as `adapters.1.3.0`.
        interface: the contents of `adapter_interface.json`, or None.
    """

    name: str
    model_type: str | None = None
    model_name: str | None = None
    version: str | None = None
    interface: dict[str, Any] | None = None

    @property
    def unscaled(self) -> bool:
        """Whether training computed LoRA without the scaling alpha / r, as `adapters` did before release 1.1."""
        release = _release(self.version)
        return release is not None and release < UNSCALED_UNTIL


def _release(version: str | None) -> Release | None:
    """Parse a release of `adapters`; return None for other texts, such as releases of adapter-transformers."""
    found = re.match(r"adapters\.(\d{1,6}(?:\.\d{1,6}){0,3})(.{0,40})$", version or "")
    if found is None:
        return None
    numbers = tuple(int(number) for number in found[1].split("."))
    return (*numbers, 0, 0, 0)[:3], not re.search(r"dev|a|b|rc", found[2])
