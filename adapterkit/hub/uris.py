"""Parse and check uris of hubs, `scheme://...` or `org/repo`, and check the names of files on hubs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from ..errors import AdapterkitError, Malformed, UsageError

MAX_NAME = 255
"""Longest file name on most file systems, in bytes."""

MAX_PATH = 1024

_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
"""Names that Windows treats as devices, in any folder and with any extension."""


def check_name(name: str, kind: type[AdapterkitError] = Malformed) -> None:
    """Check that a name is a plain relative path on every system.

    Raises:
        AdapterkitError: (of the given `kind`) the name leads outside the folder, is absolute, names a drive or a
            device, or is too long.
    """
    fault = _fault(name)
    if fault:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise kind(f"the name of a file {fault}", where=repr(shown), cure="Do not use it: nothing was written")


def check_names(names: Iterable[str]) -> None:
    """Check the names of all files in a repository, and check that no name is both a file and a folder.

    Raises:
        Malformed: a name is not allowed.
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
        return "contains a backslash, a colon or a control character"
    if len(name.encode(errors="surrogatepass")) > MAX_PATH or any(len(p.encode()) > MAX_NAME for p in parts):
        return "is too long for a file system"
    if any(part.endswith((" ", ".")) or _DEVICES.fullmatch(part) for part in parts):
        return "is a name that some systems cannot store"
    return None


# Names on hubs: `scheme://...`, where each hub defines its own syntax, or plain `org/repo[@revision]`.


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
"""Matches the scheme of a uri. One slash is enough, because `pathlib` turns `//` into `/`."""


@dataclass(frozen=True, slots=True)
class Uri:
    """A repository at a revision, or a file or folder in it.

    Attributes:
        repo: the repository's name on its hub, e.g. `org/name`.
        revision: a branch, tag or commit; None for the hub's default. In a uri, a slash in the revision is `%2F`.
        path: a file or folder inside the repository; empty for the whole repository.
        scheme: the hub's scheme.
    """

    repo: str
    revision: str | None = None
    path: str = ""
    scheme: str = "hf"

    def __str__(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"{self.scheme}://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """The repository's name without revision and path. The scheme `hf` is omitted, because it is the default."""
        return self.repo if self.scheme == "hf" else f"{self.scheme}://{self.repo}"

    def at(self, revision: str) -> Uri:
        """Return the same uri at another revision."""
        return replace(self, revision=revision)


def scheme_of(text: str) -> tuple[str | None, str]:
    """Split a name into its scheme (None if it has none) and the rest."""
    match = _SCHEME.fullmatch(text)
    return (match[1].lower(), match[2]) if match else (None, text)


@dataclass(frozen=True, slots=True)
class Address(Uri):
    """A location without commits. Its uri may end with `#` and a digest of the location's file list."""

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.repo}{path}" + (f"#{self.revision}" if self.revision else "")


def address(rest: str, scheme: str) -> Address | None:
    """Parse the name of a container, a path, and an optional digest of the file list; None if the syntax is wrong.

    Raises:
        UsageError: the path leads outside the container.
    """
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^#]*))?(?:#([0-9a-f]{64}))?", rest)
    if match is None:
        return None
    if match[2]:
        check_name(match[2], UsageError)
    return Address(match[1], match[3], match[2] or "", scheme)
