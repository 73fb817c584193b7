"""Names of things on a hub: `hf://org/repo[@revision][/path]`, or plain `org/repo[@revision]`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import UsageError
from .names import check_name

SCHEME = "hf://"
_SEGMENT = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_URI = re.compile(rf"(?P<repo>{_SEGMENT}/{_SEGMENT})(?:@(?P<revision>[^/@\s]{{1,200}}))?(?:/(?P<path>.*))?")


@dataclass(frozen=True, slots=True)
class Uri:
    """A repository at a revision, or a file or folder in it.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None for the repository's main branch. A slash in it is written `%2F`.
        path: of a file or folder inside the repository; empty for all of it.
    """

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"{SCHEME}{self.repo}{revision}" + (f"/{self.path}" if self.path else "")

    def at(self, revision: str) -> Uri:
        """The same place at another revision."""
        return replace(self, revision=revision)


def parse(text: str) -> Uri:
    """Reads a uri.

    Raises:
        UsageError: it is none of a hub's, or its path climbs out of the repository.
    """
    rest = re.sub(r"^hf:/{1,2}", "", text)
    match = _URI.fullmatch(rest.removesuffix("/"))
    if "://" in rest or match is None or ".." in match["repo"] or "--" in match["repo"]:
        raise UsageError(f"{text!r} is not the name of something on a hub", cure=f"Write {_FORM}")
    path = match["path"] or ""
    if path:
        check_name(path, UsageError)
    revision = match["revision"]
    return Uri(match["repo"], None if revision is None else re.sub("%2F", "/", revision, flags=re.IGNORECASE), path)


_FORM = "hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/path"
