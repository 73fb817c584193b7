"""Places without commits: the digest of the file listing identifies a state."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

from ...errors import RemoteNotFound
from ..remote import Remote, RemoteFile
from ..uris import Address


class Listing(Remote):
    """A place whose commit is the digest of its listing."""

    cards_below = True

    @cached_property
    def commit(self) -> str:
        told = sorted((file.path, file.size, file.digest) for file in self.files)
        if not told:
            raise RemoteNotFound("nothing is there", path=str(self.uri), cure="Check the spelling, and who may read it")
        found = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        if isinstance(self.uri, Address) and self.uri.revision not in (None, found):
            cure = "Leave out the # and the digest to read the current files"
            raise RemoteNotFound("the files have changed since this digest was taken", path=str(self.uri), cure=cure)
        return found


def unknown(path: str, size: int, *signs: object) -> RemoteFile:
    """Return a file whose digest the hub does not list; `signs` are values that change with the content."""
    text = json.dumps([path, size, *map(str, signs)])
    return RemoteFile(path, size, f"unknown:{hashlib.sha256(text.encode()).hexdigest()}")
