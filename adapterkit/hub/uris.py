"""Names of things on a hub: `scheme://...`, each scheme a hub's own to spell; or plain `org/repo[@revision]`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import UsageError
from .names import check_name

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
"""One slash is enough: paths of the operating system make two of them one."""


@dataclass(frozen=True, slots=True)
class Uri:
    """A repository at a revision, or a file or folder in it.

    Attributes:
        repo: what the hub calls the place, e.g. `org/name`.
        revision: branch, tag or commit; None for what the hub takes if none is named. A slash in it is written `%2F`.
        path: of a file or folder inside the repository; empty for all of it.
        scheme: of the hub.
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
        """What the place is called by itself: without a scheme where it is the one that all tools take for granted."""
        return self.repo if self.scheme == "hf" else f"{self.scheme}://{self.repo}"

    def at(self, revision: str) -> Uri:
        """The same place at another revision."""
        return replace(self, revision=revision)


def parse(text: str) -> Uri:
    """Reads a uri.

    Raises:
        UsageError: no hub is known by its scheme, or it is none of that hub's, or its path climbs out.
    """
    from .hubs import hub_of

    scheme, rest = scheme_of(text)
    named = hub_of(scheme or "hf").named
    uri = named(rest.removesuffix("/"))
    place, mark, member = rest.rpartition("#")
    # NAME#member is the subfolder `member`; in an address `#` and a digest name a state of the place instead.
    if mark and not isinstance(uri, Address):
        check_name(member, UsageError)
        uri = named(place.removesuffix("/"))
        if uri is not None:
            uri = replace(uri, path=f"{uri.path}/{member}" if uri.path else member)
    if uri is None:
        raise UsageError(f"{text!r} is not the name of something on a hub", cure=f"Write {hub_of(scheme or 'hf').form}")
    return uri


def scheme_of(text: str) -> tuple[str | None, str]:
    """The scheme of a name, if it has one, and the rest of it."""
    match = _SCHEME.fullmatch(text)
    return (match[1].lower(), match[2]) if match else (None, text)


@dataclass(frozen=True, slots=True)
class Address(Uri):
    """A place whose states have no names of their own: the digest of its listing stands after a `#`."""

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.repo}{path}" + (f"#{self.revision}" if self.revision else "")


def address(rest: str, scheme: str) -> Address | None:
    """An address of a container and a path in it, and the digest of a listing; None where it is none.

    Raises:
        UsageError: the path climbs out.
    """
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^#]*))?(?:#([0-9a-f]{64}))?", rest)
    if match is None:
        return None
    if match[2]:
        check_name(match[2], UsageError)
    return Address(match[1], match[3], match[2] or "", scheme)
