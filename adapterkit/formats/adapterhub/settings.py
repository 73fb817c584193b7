"""The fields at the top of a config, and the releases that wrote it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

LIBRARY = "adapters."
"""Start of `version` in configs since the library got this name; it was adapter-transformers before."""

RELEASE = "adapters.1.3.0"
"""The release named in new configs."""

UNSCALED_UNTIL = ((1, 1, 0), True)
"""Before this release the library trained LoRA without its scaling."""

Release = tuple[tuple[int, ...], bool]
"""(numbers, whether they are final): `1.1.0.dev0` comes before `1.1.0`."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields at the top of a config.

    Attributes:
        name: the adapter's name; its keys contain it.
        model_type: the family of the base, by its name in transformers.
        model_name: the base's name.
        version: the library and release that wrote the file.
        interface: the plugin interface beside it.
    """

    name: str
    model_type: str | None = None
    model_name: str | None = None
    version: str | None = None
    interface: dict[str, Any] | None = None

    @property
    def unscaled(self) -> bool:
        """Whether the library that trained it left out alpha / r, as `adapters` did before 1.1."""
        release = _release(self.version)
        return release is not None and release < UNSCALED_UNTIL


def _release(version: str | None) -> Release | None:
    """Parse a release of `adapters`; None for those of adapter-transformers, and if there is none."""
    found = re.match(r"adapters\.(\d{1,6}(?:\.\d{1,6}){0,3})(.{0,40})$", version or "")
    if found is None:
        return None
    numbers = tuple(int(number) for number in found[1].split("."))
    return (*numbers, 0, 0, 0)[:3], not re.search(r"dev|a|b|rc", found[2])
