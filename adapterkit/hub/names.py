"""Check file names from a hub before use: each must stay inside its folder and be valid on every system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from ..errors import AdapterkitError, Malformed

MAX_NAME = 255
"""Longest file name on most file systems, in bytes."""

MAX_PATH = 1024

_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
"""Names that Windows treats as devices, in any folder and with any extension."""


def check_name(name: str, kind: type[AdapterkitError] = Malformed) -> None:
    """Check that a name is a plain relative path on every system.

    Raises:
        AdapterkitError: (of the given `kind`) the name leaves the folder, is absolute, names a drive or a device, or is
            too long.
    """
    fault = _fault(name)
    if fault:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise kind(f"the name of a file {fault}", where=repr(shown), cure="Do not use it: nothing was written")


def check_names(names: Iterable[str]) -> None:
    """Check all names of a repository, and that none of them is both a file and a folder.

    Raises:
        Malformed: at the first bad name.
    """
    seen: set[str] = set()
    for name in names:
        check_name(name)
        if name in seen:
            raise Malformed("a file is listed twice", where=name, cure="Do not use it: nothing was written")
        seen.add(name)
    for name in seen:
        folder = next((str(p) for p in PurePosixPath(name).parents if str(p) in seen), None)
        if folder:
            raise Malformed("a file stands where a folder is needed", where=folder, cure="Nothing was written")


def _fault(name: str) -> str | None:
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "is not a plain relative path"
    if "\\" in name or ":" in name or not name.isprintable():
        return "holds a backslash, a colon or a control character"
    if len(name.encode(errors="surrogatepass")) > MAX_PATH or any(len(p.encode()) > MAX_NAME for p in parts):
        return "is too long for a file system"
    if any(part.endswith((" ", ".")) or _DEVICES.fullmatch(part) for part in parts):
        return "is not one that every system can store"
    return None
