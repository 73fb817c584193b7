"""The interface of a hub: list the files of a commit, read their bytes, and push.

A uri names a location on a hub: `scheme://...` or `org/repo`. This module has the classes for uris, and checks the file
names that hubs list.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar, TypeVar

from ..errors import AdapterkitError, Corrupt, Malformed, NetworkError, RemoteNotFound, Unsupported, UsageError, nearest
from .web import Passing, retrying

MAX_NAME = 255
"""Longest file name on most file systems, in bytes."""

MAX_PATH = 1024

_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
"""Names that Windows treats as devices, in any folder and with any extension."""


def check_name(name: str, kind: type[AdapterkitError] = Malformed) -> None:
    """Check that a file name is a plain relative path that every operating system can store.

    Raises:
        AdapterkitError: the name is absolute, has `..` as a path component, names a drive or a device, is too long, or
            cannot be stored on some operating systems. The error's class is `kind`.
    """
    fault = _fault(name)
    if fault:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise kind(f"the name of a file {fault}", where=repr(shown), cure="Nothing was written. Use another name")


def check_names(names: Iterable[str]) -> None:
    """Check the names of all files in a repository, and check that no name is both a file and a folder.

    Raises:
        Malformed: `check_name` refuses a name, a name occurs twice, or a name is both a file and a folder.
    """
    seen: set[str] = set()
    for name in names:
        check_name(name)
        if name in seen:
            cure = "Nothing was written. Tell the repository's owner"
            raise Malformed("the hub lists this file twice", where=name, cure=cure)
        seen.add(name)
    for name in seen:
        folder = next((str(p) for p in PurePosixPath(name).parents if str(p) in seen), None)
        if folder:
            cure = "Nothing was written. Tell the repository's owner"
            raise Malformed("this name is both a file and a folder", where=folder, cure=cure)


def _fault(name: str) -> str | None:
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "is not a plain relative path"
    if "\\" in name or ":" in name or not name.isprintable():
        return "contains a backslash, a colon or a control character"
    if len(name.encode(errors="surrogatepass")) > MAX_PATH or any(len(p.encode()) > MAX_NAME for p in parts):
        return "is too long for a file system"
    if any(part.endswith((" ", ".")) or _DEVICES.fullmatch(part) for part in parts):
        return "cannot be stored on some systems"
    return None


# A uri is either `scheme://...`, with a syntax that the scheme's hub defines, or plain `org/repo[@revision]`.


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
"""Matches the scheme and the rest of a uri. It also accepts `scheme:/`, because `pathlib` turns `//` into `/`."""


@dataclass(frozen=True, slots=True)
class Uri:
    """A repository at a revision, or a file or folder in this repository.

    Attributes:
        repo: the repository's name on its hub, e.g. `org/name`.
        revision: a branch, tag or commit; None for the hub's default. In a uri, a slash in the revision is written as
            `%2F`.
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
        """The scheme and the repository, without the revision and the path. The default scheme `hf` is omitted."""
        return self.repo if self.scheme == "hf" else f"{self.scheme}://{self.repo}"

    def at(self, revision: str) -> Uri:
        """Return the same uri at another revision."""
        return replace(self, revision=revision)


def scheme_of(text: str) -> tuple[str | None, str]:
    """Split a uri into its scheme and the rest. If `text` has no scheme, return None and the whole `text`."""
    match = _SCHEME.fullmatch(text)
    return (match[1].lower(), match[2]) if match else (None, text)


@dataclass(frozen=True, slots=True)
class Address(Uri):
    """A location without commits, e.g. a bucket. Its uri may end with `#` and a digest of the location's file list."""

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.repo}{path}" + (f"#{self.revision}" if self.revision else "")


def address(rest: str, scheme: str) -> Address | None:
    """Parse `CONTAINER/PATH#DIGEST`: a bucket or host, a path in it, and a digest of the file list.

    The path and the digest are optional. The result is None if the syntax is wrong.

    Raises:
        UsageError: `check_name` refuses the path, for example because it leads outside the container.
    """
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/([^#]*))?(?:#([0-9a-f]{64}))?", rest)
    if match is None:
        return None
    if match[2]:
        check_name(match[2], UsageError)
    return Address(match[1], match[3], match[2] or "", scheme)


T = TypeVar("T")

MAX_FILES = 100_000

Digests = tuple[int, str, str]
"""A file's size in bytes, and its two digests `sha256:...` and `git:...`."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A file that has been uploaded but is not in a commit yet; see `Remote.place`.

    Attributes:
        path: the path inside the repository.
        digests: the digests of the bytes.
        mark: the hub's identifier of the stored bytes, such as an ETag; empty if the hub identifies bytes by digest.
    """

    path: str
    digests: Digests
    mark: str = ""


Content = Path | bytes | Placed
"""The content of one pushed file: a local path, the bytes, or an uploaded file."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        path: the path inside the repository.
        size: the size in bytes.
        digest: `sha256:...` or `md5:...` of the content, or `git:...`, the sha1 that git computes for a file. If the
            hub lists no digest, this is `unknown:...`, a hash of values that change with the content, such as an ETag.
    """

    path: str
    size: int
    digest: str

    @property
    def verifiable(self) -> bool:
        """Whether the digest is computed from the file's bytes, so that the bytes can be verified."""
        return not self.digest.startswith("unknown:")


class Remote(ABC):
    """A repository, bucket or registry on a hub.

    Args:
        uri: the repository and its revision.
        token: an access token. If absent, the token that the hub's own tools have stored is used.
    """

    form: ClassVar[str]
    """The syntax of uris on this hub, for error messages."""

    whole: ClassVar[bool] = False
    """True if a push replaces the whole artifact: it removes all remote files that are not part of the push."""

    cards_below: ClassVar[bool] = False
    """True if each folder of a repository can have its own model card."""

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        self.uri, self.token = uri, token

    @classmethod
    @abstractmethod
    def named(cls, rest: str) -> Uri | None:
        """Parse the part of a uri after the scheme; return None if it does not follow this hub's syntax."""

    @property
    @abstractmethod
    def commit(self) -> str:
        """The permanent identifier of the commit that the revision points to now.

        Raises:
            NetworkError: the repository or revision does not exist, access is denied, or the hub is not reachable.
        """

    @abstractmethod
    def listed(self) -> Iterable[RemoteFile]:
        """Return the files of the commit; implementations make their requests through `call`."""

    @abstractmethod
    def opened(
        self, file: RemoteFile, start: int, end: int | None
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Open a file for reading from byte `start` up to but not including byte `end` (None: the end of the file).

        Returns:
            The offset of the first byte, and the bytes in chunks. If the hub ignores ranges, the offset is 0.
        """

    @abstractmethod
    def passing(self, error: Exception) -> Passing | None:
        """Return a `Passing` if the exception is a temporary failure; None if a retry is useless."""

    @abstractmethod
    def failure(self, error: Exception) -> AdapterkitError | None:
        """Convert a network or hub failure to adapterkit's error, without secrets. Return None for other exceptions."""

    @cached_property
    def files(self) -> tuple[RemoteFile, ...]:
        """All files of the commit; their names have been checked.

        Raises:
            Malformed: `check_names` refuses the file names, or there are more than `MAX_FILES` files.
            NetworkError: in the same cases as `commit`.
        """
        collected: list[RemoteFile] = []
        for file in self.listed():
            collected.append(file)
            if len(collected) > MAX_FILES:
                raise Malformed(
                    f"the repository has more than {MAX_FILES:,} files",
                    path=str(self.uri),
                    cure="Add the path of a folder to the uri",
                )
        try:
            check_names(file.path for file in collected)
        except AdapterkitError as error:
            raise error.at(path=str(self.uri)) from None
        return tuple(collected)

    def below(self, path: str) -> tuple[RemoteFile, ...]:
        """Return the files in a folder of the repository, including its subfolders; or the single file at `path`.

        Raises:
            RemoteNotFound: the path does not exist.
        """
        below = tuple(f for f in self.files if not path or f.path == path or f.path.startswith(f"{path}/"))
        if not below:
            cure = nearest(path, (file.path for file in self.files)) or "List the files: 'adapterkit pull --dry-run'"
            raise RemoteNotFound("the repository has no such file or folder", path=str(self.uri), cure=cure)
        return below

    def call(self, act: Callable[[], T]) -> T:
        """Run a request, with retries for temporary failures.

        Raises:
            NetworkError: the last retry failed too, or the failure is permanent.
        """
        try:
            return retrying(act, self.passing)
        except AdapterkitError:
            raise
        except Exception as error:
            failure = self.failure(error)
            if failure is None:
                raise
        # Raise the error after the `except` block. Inside the block, Python would attach the caught exception to the
        # new error, and a traceback would show the request's headers with the token.
        raise failure

    def there(self) -> Mapping[str, RemoteFile] | None:
        """Before a push, return the repository's files, keyed by path; None if the repository does not exist.

        Raises:
            NetworkError: access is denied, or the hub is not reachable.
        """
        try:
            return {file.path: file for file in self.files}
        except RemoteNotFound:
            return None

    def check_writable(self) -> None:
        """Raise an error if adapterkit cannot push to this kind of hub.

        Raises:
            Unsupported: adapterkit cannot push to this kind of hub.
        """
        if type(self).send is Remote.send:
            why = f"adapterkit cannot push to {self.uri.scheme}://"
            raise Unsupported(why, path=str(self.uri), cure="Push to hf://, oci:// or s3://")

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], digests: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        """Upload files, and make all of them visible at once.

        Args:
            files: the content of all files of the push, keyed by path.
            changed: the paths of the files that are missing on the hub, or whose content differs from the hub's file.
            digests: the digests of all files, keyed by path.
            message: the commit message.
            private: if the repository does not exist, create it as a private repository.

        Returns:
            The commit.
        """
        self.check_writable()
        raise AssertionError("a hub that accepts pushes overrides this method")

    def begin(self) -> None:
        """Prepare for `place`: reserve the target or create the repository. Missing permissions raise an error here.

        Raises:
            NetworkError: access is denied, another push is running, or the hub is not reachable.
            Unsupported: this kind of hub has no `place`, which uploads single files before a push.
        """
        self.check_writable()
        if type(self).place is Remote.place:
            why = f"files cannot be uploaded to {self.uri.scheme}:// one at a time"
            raise Unsupported(why, path=str(self.uri), cure="Write to hf://, oci:// or s3://")

    def place(self, path: str, file: Path, digests: Digests) -> Placed:
        """Upload one file, and return a `Placed` for it. When `send` gets this `Placed`, the file becomes visible.

        Args:
            path: the path inside the repository.
            file: the local file.
            digests: the digests of the local file.

        Raises:
            NetworkError: access is denied, or the hub is not reachable.
            Corrupt: the hub received bytes that differ from the local file.
        """
        raise AssertionError("hubs that support `place` override this method")

    def holds(self, placed: Placed) -> bool:
        """Whether the hub still has the bytes of an uploaded file."""
        raise AssertionError("hubs that support `place` override this method")

    def kept(self) -> str:
        """Finish a push that changes no files: create the branch if it is missing, and return the current commit."""
        return self.commit

    def tagged(self, tag: str, commit: str) -> None:
        """Set a tag on a commit."""
        raise Unsupported(f"{self.uri.scheme}:// has no tags", path=str(self.uri), cure="Omit --tag (tag=)")


def largest_first(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Sort files, largest first. If a large file came last, it would use one connection while the others are idle."""
    return sorted(files, key=lambda file: (-file.size, file.path))


def lost(place: str, name: str) -> Corrupt:
    """Return the error for an uploaded file that the hub no longer has."""
    why = "the hub no longer has a file that a task uploaded"
    cure = "Run the same command again to upload this file. Make sure that no other program changes files at this uri"
    return Corrupt(why, path=place, where=name, cure=cure)


NOT_REACHED = "Check the connection, then run the same command again: it continues where it stopped"


def unreachable(place: str, host: str, error: Exception) -> NetworkError:
    """Return the error for a failed connection.

    If `error` is a `Passing`, its text is shown. The text of any other exception may contain secrets, so only the
    exception's type is shown.
    """
    why = f"cannot reach {host} ({type(error).__name__.removesuffix('Error')})"
    return NetworkError(str(error) if isinstance(error, Passing) else why, path=place, cure=NOT_REACHED)
