"""The hubs, one module per scheme. Other packages add hubs through the entry point group `adapterkit.hubs`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from ...core.arguments import checks_types
from ...core.registry import Registry
from ...errors import AccessDenied, AdapterkitError, NetworkError, RemoteNotFound, Unsupported, UsageError, nearest
from ..remote import Address, Remote, RemoteFile, Uri, address, check_name, scheme_of
from ..web import Passing

# Hubs without commits, such as S3. A digest of the file list takes the place of the commit.


class Listing(Remote):
    """A location without commits; the digest of its file list is used as the commit."""

    cards_below = True

    @cached_property
    def commit(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride] - callers read it like a property
        listing = sorted((file.path, file.size, file.digest) for file in self.files)
        if not listing:
            raise RemoteNotFound(
                "the uri has no files", path=str(self.uri), cure="Check the spelling and your access rights"
            )
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        if isinstance(self.uri, Address) and self.uri.revision not in (None, digest):
            cure = "Omit the # and the digest to read the current files"
            raise RemoteNotFound("the files have changed since this digest was taken", path=str(self.uri), cure=cure)
        return digest


def unknown(path: str, size: int, *signs: object) -> RemoteFile:
    """Return the `RemoteFile` of a file for which the hub lists no digest.

    Its `digest` is the text `unknown:`, followed by a hash of `path`, `size` and `signs`.

    Args:
        path: the path inside the repository.
        size: the size in bytes.
        signs: values that change when the file changes, such as an ETag or a modification time.
    """
    text = json.dumps([path, size, *map(str, signs)])
    return RemoteFile(path, size, f"unknown:{hashlib.sha256(text.encode()).hexdigest()}")


# Read from any location that fsspec supports. fsspec lists no digests, so only sizes are checked. Pushes are refused.


CHUNK = 1 << 20
LOCAL = {"file", "local", "hf", "dir", "reference", "simplecache", "filecache", "blockcache", "cached"}
"""Schemes that fsspec supports, but that adapterkit does not read through fsspec. Other modules read local paths and
`hf`. The remaining schemes wrap another location."""

CHANGE_KEYS = ("ETag", "etag", "mtime", "created", "LastModified")
OTHER_CHANGE_KEYS = (
    "Last-Modified",
    "last_modified",
    "updated",
    "modify",
    "modificationTime",
    "last_write_time",
    "sha",
    "hex",
)
"""Keys of fsspec's file details that change with the file's content. `OTHER_CHANGE_KEYS` is used only if a file
system gives none of `CHANGE_KEYS`: otherwise, the digests of known file lists would change."""

_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
"""The hosts of the Hugging Face hub's web pages. Users copy the url of such a page from a browser."""


class Filesystem(Listing):
    """A folder or a file on an fsspec file system."""

    scheme = ""

    @classmethod
    def named(cls, rest: str) -> Uri | None:
        rest = rest.lstrip("/")
        port = re.match(r"[^/:#]*(:\d{1,5})(?=[/#]|\Z)", rest)
        if port is None:
            return address(rest, cls.scheme)
        uri = address(rest[: port.start(1)] + rest[port.end(1) :], cls.scheme)
        return uri and replace(uri, repo=uri.repo + port[1])

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The fsspec file system, and the path of the uri's bucket or host in this file system."""
        import fsspec

        if self.scheme in ("http", "https") and self.uri.repo.split("/")[0] in _HUB_HOSTS:
            repo = "/".join(str(self.uri).split("/")[3:5]) or "org/repo"
            cure = f"Write hf://{repo}, or hf://{repo}/FILE for one file"
            raise UsageError("this url belongs to a web page of the Hugging Face hub", path=str(self.uri), cure=cure)
        try:
            return fsspec.core.url_to_fs(f"{self.scheme}://{self.uri.repo}")  # type: ignore[no-any-return]
        except ImportError as error:
            cure = f"Install the package that fsspec needs for this scheme ({error.name or 'see its documentation'})"
            raise Unsupported(f"{self.scheme}:// cannot be read", path=str(self.uri), cure=cure) from None

    def listed(self) -> list[RemoteFile]:
        system, root = self._opened
        place = f"{root}/{self.uri.path}" if self.uri.path else root
        # If the uri names a file, `find` returns only this file. List its folder too, because the config is a separate
        # file next to the weights.
        details = self.call(lambda: system.find(place, detail=True))
        if len(details) == 1 and place in {str(name).rstrip("/") for name in details}:
            with suppress(RemoteNotFound):  # Many web servers have the file, but do not list its folder.
                beside = self.call(
                    lambda: {e["name"]: e for e in system.ls(place.rpartition("/")[0]) if e["type"] == "file"}
                )
                details |= beside
        return [self._file(str(name), root, details) for name, details in details.items()]

    def _file(self, name: str, root: str, details: Mapping[str, object]) -> RemoteFile:
        if details.get("size") is None:  # A web server states the size of a file only when it is asked for this file.
            details = self.call(lambda: self._opened[0].info(name))
        size, signs = details.get("size"), [details.get(key) for key in CHANGE_KEYS]
        if signs == [None] * len(CHANGE_KEYS):
            signs += [details[key] for key in OTHER_CHANGE_KEYS if key in details]
        if type(size) is not int:
            cure = "Download the file with another tool, and pass its local path"
            raise Unsupported(
                "the file system does not give the size of a file", path=str(self.uri), where=name, cure=cure
            )
        return unknown(name.removeprefix(root).lstrip("/"), size, *signs)

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        system, root = self._opened
        with system.open(f"{root}/{file.path}", "rb") as source:
            source.seek(start)
            yield start, iter(lambda: source.read(CHUNK), b"")

    def passing(self, error: Exception) -> Passing | None:
        if isinstance(error, Passing):
            return error
        lost = isinstance(error, (ConnectionError, TimeoutError))
        return Passing("the connection was lost") if lost else None

    def failure(self, error: Exception) -> AdapterkitError | None:
        place = str(self.uri)
        if isinstance(error, FileNotFoundError):
            return RemoteNotFound("the uri has no files", path=place, cure="Check the spelling")
        if isinstance(error, PermissionError):
            return AccessDenied("access is denied", path=place, cure="Set the credentials that fsspec needs")
        return NetworkError(f"the uri cannot be read ({type(error).__name__})", path=place, cure="Check the uri")


@cache
def filesystem(scheme: str) -> type[Filesystem] | None:
    """Return a hub class that reads a scheme through fsspec.

    Return None if fsspec does not support the scheme, or if the scheme is in `LOCAL`.
    """
    if scheme in LOCAL:
        return None
    import fsspec

    if scheme not in fsspec.available_protocols():
        return None
    return type("Filesystem", (Filesystem,), {"scheme": scheme, "form": f"{scheme}://container/path"})


# The registry of hubs.


HUBS: Registry[type[Remote]] = Registry("hub", __name__, "adapterkit.hubs", Remote)


@checks_types
def hub_of(scheme: str) -> type[Remote]:
    """Return the hub class of a scheme. For a scheme that is not in `HUBS`, return a class that reads through fsspec.

    Raises:
        UsageError: the scheme is unknown.
    """
    if scheme in HUBS:
        return HUBS[scheme]
    other = filesystem(scheme)
    if other is not None:
        return other
    cure = nearest(scheme, HUBS) or f"Known: {', '.join(HUBS[name].form for name in HUBS)}"
    raise UsageError(f"unknown scheme {scheme!r}", cure=cure)


def remote_at(uri: Uri, token: str | None = None) -> Remote:
    """Return a `Remote`, which lists, reads and pushes the files of a uri."""
    return hub_of(uri.scheme)(uri, token)


@checks_types
def parse(text: str) -> Uri:
    """Parse a uri.

    Raises:
        UsageError: the scheme is unknown, the rest of the uri does not follow the hub's syntax, or the path leads
            outside the repository.
    """
    scheme, rest = scheme_of(text)
    named = hub_of(scheme or "hf").named
    uri = named(rest.removesuffix("/"))
    place, mark, member = rest.rpartition("#")
    # `NAME#member` means the subfolder `member`. An `Address` is different: the text after its `#` is a digest of the
    # file list.
    if mark and not isinstance(uri, Address):
        check_name(member, UsageError)
        uri = named(place.removesuffix("/"))
        if uri is not None:
            uri = replace(uri, path=f"{uri.path}/{member}" if uri.path else member)
    if uri is None:
        local = "" if scheme else ". A local file needs no transfer: copy it, or use 'adapterkit convert'"
        cure = f"Write {hub_of(scheme or 'hf').form}{local}"
        raise UsageError(f"{text!r} is not a name on a hub", cure=cure)
    return uri
